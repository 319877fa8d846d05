"""Machines side by side: ``python -m perf.machines [ROUNDS]``, where KVM runs stock kernels.

On a host whose KVM does not: ``python -m tests.lab.kvm -- python -m perf.machines``, in an emulated
machine, where only ratios mean something.  Each round boots one guest on each VMM in turn, with the
same kernel, initrd, disks and tap; the guest says when it does what, and between two such marks the
VMM's exits (KVM's own count) and CPU time are taken.  Then restores of small and large machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.lab import innermost, rootfs
from tests.lab.innermost import Bootable
from vdev.vmm import snapshot as snapshots
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig
from vdev.vmm.machine import Machine

MIB = 1 << 20
TAP, HOST, GUEST = "vdevperf0", "10.78.0.1", "10.78.0.2"
_FIO_SECONDS = 5
_EXITS = Path("/sys/kernel/debug/kvm/exits")
_GUARD = 180.0
_FIO = (
    "fio --name=f --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 --bs=4k "
    f"--rw=randread --time_based --runtime={_FIO_SECONDS} --group_reporting --output-format=json"
)
_SCRIPT = f"""
dmesg | grep 'Run /init'
ip addr add {GUEST}/24 dev eth0; ip link set eth0 up
mount -o ro,noload /dev/vda /mnt; mount --bind /dev /mnt/dev; mount -t proc proc /mnt/proc
mount -t tmpfs tmp /mnt/tmp
echo MARK fio; chroot /mnt {_FIO} --output=/tmp/fio; echo MARK fio-end
grep -m1 '"iops" ' /mnt/tmp/fio; grep -m1 '"total_ios" ' /mnt/tmp/fio
echo MARK up; chroot /mnt iperf3 -c {HOST} -t 4 -J >/mnt/tmp/up; echo MARK up-end
grep -m1 -A9 sum_received /mnt/tmp/up | grep bits_per
echo MARK down; chroot /mnt iperf3 -c {HOST} -t 4 -R -J >/mnt/tmp/down; echo MARK down-end
grep -m1 -A9 sum_received /mnt/tmp/down | grep bits_per
echo MARK idle; sleep 3; echo MARK idle-end
"""


@dataclass
class Run:
    """What one guest on one VMM said and took."""

    said: bytearray = field(default_factory=bytearray)
    marks: dict[str, tuple[float, int, float]] = field(default_factory=dict)
    """Name → time in s, exits, CPU time of the VMM in s."""

    def feed(self, data: bytes, cpu: Callable[[], float]) -> None:
        self.said += data
        for name in re.findall(r"MARK ([\w-]+)\r?\n", self.said.decode(errors="replace")):
            if name not in self.marks:
                self.marks[name] = (time.monotonic(), int(_EXITS.read_text()), cpu())

    def figures(self) -> dict[str, float]:
        """Name → value; raises ValueError where the guest did not say what was wanted."""
        text = self.said.decode(errors="replace")
        try:
            (init,) = _numbers(r"\[ *([\d.]+)\] Run /init", text)
            (iops,) = _numbers(r'"iops" : ([\d.]+)', text)
            (requests,) = _numbers(r'"total_ios" : (\d+)', text)
            up, down = _numbers(r'"bits_per_second":\s+([\d.e+]+)', text)
        except ValueError as error:
            raise ValueError(f"{error}; the guest said:\n{text[-3000:]}") from None
        fio, idle = self._between("fio"), self._between("idle")
        return {
            "init after (s)": init,
            "4 KiB reads a second": iops,
            "exits a read": fio[1] / requests,
            "VMM CPU a read (µs)": 1e6 * fio[2] / requests,
            "TCP up (Mbit/s)": up / 1e6,
            "TCP down (Mbit/s)": down / 1e6,
            "CPU when idle (%)": 100 * idle[2] / idle[0],
        }

    def _between(self, name: str) -> tuple[float, int, float]:
        (t0, e0, c0), (t1, e1, c1) = self.marks[name], self.marks[f"{name}-end"]
        return t1 - t0, e1 - e0, c1 - c0


def _numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


class Vmm(ABC):
    """Something that runs a guest to its end."""

    name: str

    @abstractmethod
    async def run(self, kernel: Bootable, cmdline: str, disks: tuple[Path, Path]) -> Run: ...


class Vdev(Vmm):
    def __init__(self, transport: str) -> None:
        self.name = f"vdev {transport}"
        self._transport = transport

    async def run(self, kernel: Bootable, cmdline: str, disks: tuple[Path, Path]) -> Run:
        run = Run()
        root, data = disks
        config = MachineConfig(
            name="perf",
            kernel=str(kernel.vmlinux),
            initrd=str(kernel.initrd),
            cmdline=cmdline,
            memory=256 * MIB,
            transport=self._transport,
            rng=False,
            disks=(DiskConfig(str(root), read_only=True), DiskConfig(str(data))),
            nics=(NicConfig(tap=TAP),),
        )
        async with Machine(config) as machine:
            await machine.start()
            async for chunk in machine.console.attach():
                run.feed(chunk, time.process_time)
            await machine.wait()
        return run


class Qemu(Vmm):
    def __init__(self, machine: str, bus: str) -> None:
        self.name = f"qemu {machine.split(',')[0]}"
        self._machine, self._bus = machine, bus

    async def run(self, kernel: Bootable, cmdline: str, disks: tuple[Path, Path]) -> Run:
        run = Run()
        root, data = disks
        process = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-accel", "kvm", "-M", self._machine, "-cpu", "host"),
            *("-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-kernel", kernel.vmlinux, "-initrd", kernel.initrd),
            *("-append", cmdline, "-object", "iothread,id=io"),
            *("-drive", f"file={root},format=raw,if=none,id=a,readonly=on,aio=io_uring"),
            *("-device", f"virtio-blk-{self._bus},drive=a,iothread=io"),
            *("-drive", f"file={data},format=raw,if=none,id=b,aio=io_uring"),
            *("-device", f"virtio-blk-{self._bus},drive=b,iothread=io"),
            *("-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no"),
            *("-device", f"virtio-net-{self._bus},netdev=n"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            while chunk := await process.stdout.read(65536):
                run.feed(chunk, lambda: cpu_seconds(process.pid))
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        return run


async def compare(rounds: int, console: Console) -> None:
    """Boots, disk, net and idling."""
    material = await innermost.prepare()
    tools = await rootfs.build()
    vmms: list[Vmm] = [Vdev("pci"), Qemu("q35", "pci"), Vdev("mmio"), Qemu("microvm", "device")]
    rows: dict[str, list[dict[str, float]]] = {vmm.name: [] for vmm in vmms}
    with tempfile.TemporaryDirectory() as place:
        data = _data(Path(place, "data.img"))
        async with _network():
            for number in range(rounds):
                for vmm in vmms:
                    end = "reboot" if isinstance(vmm, Qemu) else "poweroff"
                    words = (
                        f"console=ttyS0 quiet panic=-1 reboot=t {innermost.script(_SCRIPT, end)}"
                    )
                    run = await asyncio.wait_for(
                        vmm.run(material.cloud, words, (tools, data)), _GUARD
                    )
                    rows[vmm.name].append(run.figures())
                    console.print(f"round {number + 1}: {vmm.name}", json.dumps(rows[vmm.name][-1]))
    table = Table("", *rows)
    for name in next(iter(rows.values()))[0]:
        medians = (statistics.median(found[name] for found in runs) for runs in rows.values())
        table.add_row(name, *(f"{value:,.3g}" for value in medians))
    console.print(table)


async def restore(rounds: int, console: Console) -> None:
    """How long until a restored machine runs, by the size of its memory."""
    material = await innermost.prepare()
    times: dict[int, list[float]] = {256 * MIB: [], 2048 * MIB: []}
    with tempfile.TemporaryDirectory() as place:
        for size in times:
            config = MachineConfig(
                name="perf",
                kernel=str(material.cloud.vmlinux),
                initrd=str(material.cloud.initrd),
                cmdline="console=ttyS0 quiet " + innermost.script("while :; do echo tick; done"),
                memory=size,
            )
            async with Machine(config) as machine:
                await machine.start()
                async for chunk in machine.console.attach():
                    if b"tick" in chunk:
                        break
                await machine.snapshot(f"{place}/{size}")
        for _ in range(rounds):
            for size, taken in times.items():
                began = time.monotonic()
                snapshot = snapshots.read(f"{place}/{size}")
                async with Machine(snapshots.config_of(snapshot), snapshot) as machine:
                    await machine.start()
                    taken.append(time.monotonic() - began)
    small, large = (statistics.median(taken) for taken in times.values())
    console.print(
        f"restore: 256 MiB {1e3 * small:.0f} ms, 2 GiB {1e3 * large:.0f} ms, "
        f"ratio {large / small:.2f}"
    )


def _data(path: Path) -> Path:
    path.write_bytes(os.urandom(64 * MIB))
    return path


class _network:
    """The tap, its address, and an iperf3 server behind it."""

    async def __aenter__(self) -> None:
        for command in (
            f"ip tuntap add {TAP} mode tap vnet_hdr",
            f"ip addr add {HOST}/24 dev {TAP}",
            f"ip link set {TAP} up",
        ):
            await _command(command)
        self._server = await asyncio.create_subprocess_exec(
            *("iperf3", "-s", "-B", HOST), stdout=asyncio.subprocess.DEVNULL
        )

    async def __aexit__(self, *exc: object) -> None:
        self._server.kill()
        await self._server.wait()
        await _command(f"ip link delete {TAP}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _command(text: str) -> None:
    process = await asyncio.create_subprocess_exec(*text.split())
    if await process.wait():
        raise RuntimeError(f"{text}: exit code {process.returncode}")


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    console = Console(width=110, highlight=False)

    async def everything() -> None:
        if not _EXITS.parent.is_dir():
            await _command(f"mount -t debugfs debugfs {_EXITS.parents[1]}")
        await compare(rounds, console)
        await restore(rounds, console)

    asyncio.run(everything())
    return 0


if __name__ == "__main__":
    sys.exit(main())
