"""Our share of a machine's start: ``python -m perf.machine_start [ROUNDS]``.

From exec to the first byte of a guest whose kernel is six instructions long, so that there is
hardly anything but the monitor: such a kernel runs on every kind of KVM, on one that emulates guest
kernel code too.  In turn with the interpreter alone, and with QEMU's two machines, whose firmware
runs first; the median of each, and the memory beyond the guest's.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from perf import installed
from tests.vmm.boot_images import elf
from vdev.vmm.layout import KERNEL_BASE

MIB = 1 << 20
GUEST_MEMORY = 256 * MIB
_TAP = "vdevperf1"
# out 0x3f8, 'K'; hlt for ever
_KERNEL = bytes.fromhex("66baf803 b04b ee fa f4 ebfd")
# Without the register that a KVM which emulates kernel code refuses.
_CPU = "host,arch-capabilities=off"
# The command line's program, on whatever KVM there is.
_VDEV = """
import sys, vdev.vmm.host
vdev.vmm.host.kvm_usable = lambda: None
from vdev.cli import main
sys.exit(main())
"""
_INTERPRETER = "print('K', flush=True); import sys; sys.stdin.read()"


@dataclass
class Start:
    """From exec to the first byte in s, CPU time in s, memory that is not the guest's in bytes."""

    seconds: float
    cpu: float
    memory: int


def measure(command: list[str], guest_memory: str, environment: dict[str, str]) -> Start:
    """One start, ended as soon as it was seen. guest_memory: what the mapping of the guest's memory
    is called, which does not count. Raises RuntimeError where it ends without a byte."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdout is not None
    try:
        while (byte := process.stdout.read(1)) != b"K":
            if not byte:
                raise RuntimeError(f"{command[0]} ended with {process.wait()} before its guest ran")
        seconds = time.monotonic() - began
        return Start(seconds, _cpu(process.pid), _memory(process.pid, guest_memory))
    finally:
        children = [os.pidfd_open(pid) for pid in _children(process.pid)]
        process.kill()
        process.communicate()
        # Who tidies up behind it is not to take the next one's time.
        for child in children:
            select.select([child], [], [])
            os.close(child)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _cpu(pid: int) -> float:
    """Of threads that have ended too (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int, guest_memory: str) -> int:
    """The proportional share (PSS) of all mappings but the guest's memory (proc(5), smaps)."""
    kib, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Pss:") and counts:
            kib += int(line.split()[1])
        elif "-" in line.split()[0] and ":" not in line.split()[0]:
            counts = guest_memory not in line
    return kib * 1024


def commands(python: str, place: Path) -> dict[str, tuple[list[str], str]]:
    """Name → command, name of the guest's memory."""
    kernel, disk = place / "kernel", place / "disk"
    # Longer than the first look at a kernel.
    kernel.write_bytes(elf([(KERNEL_BASE, _KERNEL.ljust(0x400, b"\0"), 4096)]))
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    vdev = [
        *(python, "-P", "-c", _VDEV, "run", "--vmm", "kvm", "--kernel", str(kernel)),
        *("--memory", "256M", "--disk", str(disk), "--net", f"tap={_TAP}"),
    ]

    def qemu(machine: str, bus: str) -> list[str]:
        return [
            *("qemu-system-x86_64", "-accel", "kvm", "-M", machine, "-cpu", _CPU),
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
            *("-object", f"memory-backend-memfd,id=ram,size={GUEST_MEMORY}", "-m", "256"),
            *("-machine", "memory-backend=ram", "-kernel", str(kernel)),
            *("-drive", f"file={disk},format=raw,if=none,id=a,aio=io_uring"),
            *("-device", f"virtio-blk-{bus},drive=a"),
            *("-netdev", f"tap,id=n,ifname={_TAP},script=no,downscript=no"),
            *("-device", f"virtio-net-{bus},netdev=n"),
            *("-device", f"virtio-rng-{bus}"),
        ]

    return {
        "python alone": ([python, "-P", "-c", _INTERPRETER], "-"),
        "vdev run": (vdev, "guest-ram"),
        "vdev run, no card": (vdev[:-2], "guest-ram"),
        "qemu microvm": (qemu("microvm", "device"), "memfd:"),
        "qemu q35": (qemu("q35", "pci"), "memfd:"),
    }


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    console = Console(width=110, highlight=False)
    taken: dict[str, list[Start]] = {}
    program = installed.find()
    with tempfile.TemporaryDirectory() as place:
        found = commands(program.command[0], Path(place))
        subprocess.run(f"ip tuntap add {_TAP} mode tap vnet_hdr".split(), check=True)
        try:
            for _ in range(rounds + 1):  # the first fills caches
                for name, (command, memory) in found.items():
                    taken.setdefault(name, []).append(measure(command, memory, program.environment))
        finally:
            subprocess.run(f"ip link delete {_TAP}".split(), check=True)
    table = Table("", "exec to first byte (ms)", "least", "CPU (ms)", "memory of its own (MiB)")
    for name, starts in taken.items():
        starts = starts[1:]
        table.add_row(
            name,
            f"{1e3 * statistics.median(s.seconds for s in starts):.1f}",
            f"{1e3 * min(s.seconds for s in starts):.1f}",
            f"{1e3 * statistics.median(s.cpu for s in starts):.1f}",
            f"{statistics.median(s.memory for s in starts) / MIB:.1f}",
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
