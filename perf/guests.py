"""Guests side by side: one kernel, initrd, disk and load on different VMMs, each a process.

A guest obeys shell commands on its serial console, so that whoever measures says when what runs.
All of them live at once, each on a tap of its own, and all but one are stopped (SIGSTOP): windows
of different VMMs then lie seconds apart, and a boot is not paid for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import innermost
from tests.lab.innermost import Bootable

_GUARD = 120.0
"""Seconds after which a guest that does not answer is given up."""
AGENT = 'stty -echo; while read -r line; do eval "$line"; done'
# A guest that stood still would complain of it on the console, which costs exits.
_WORDS = "console=ttyS0 loglevel=1 panic=-1 nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
_MOUNTS = (
    "mount -o ro,noload /dev/vda /mnt",
    "mount --bind /dev /mnt/dev",
    "mount -t proc proc /mnt/proc",
    "mount -t tmpfs tmp /mnt/tmp",
)


@dataclass(frozen=True)
class Place:
    """What a guest finds: its disks, both read only, its tap and the subnet behind it."""

    root: Path
    data: Path
    tap: str
    network: str
    """The first three numbers of an IPv4 network; the host is 1 in it, the guest 2."""

    @property
    def host(self) -> str:
        return f"{self.network}.1"


@dataclass(frozen=True)
class Vmm:
    """A VMM and the machine that it makes. bus: "pci" or "mmio"."""

    name: str
    program: str
    bus: str

    def command(self, kernel: Bootable, place: Place) -> list[str]:
        """The words of its command line; its standard input and output are the serial port."""
        if self.program == "vdev":
            return self._vdev(kernel, f"{_WORDS} {innermost.script(AGENT, 'poweroff')}", place)
        # QEMU ends with a reset, for which not each of its machines has another way; in ours a
        # triple fault is nothing that a guest of its own accord does.
        return self._qemu(kernel, f"{_WORDS} reboot=t {innermost.script(AGENT, 'reboot')}", place)

    def _vdev(self, kernel: Bootable, words: str, place: Place) -> list[str]:
        return [
            *(sys.executable, "-m", "vdev", "run", "--vmm", "kvm", "--name", f"perf-{self.bus}"),
            *("--kernel", str(kernel.vmlinux), "--initrd", str(kernel.initrd)),
            *("--append", words, "--memory", "256M", "--transport", self.bus, "--no-reboot"),
            *("--disk", f"{place.root},ro", "--disk", f"{place.data},ro"),
            *("--net", f"tap={place.tap}"),
        ]

    def _qemu(self, kernel: Bootable, words: str, place: Place) -> list[str]:
        machine, device = {"pci": ("q35", "pci"), "mmio": ("microvm", "device")}[self.bus]
        return [
            *("qemu-system-x86_64", "-accel", "kvm", "-M", machine, "-cpu", "host"),
            *("-name", "perf,debug-threads=on", "-m", "256", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-kernel", str(kernel.vmlinux), "-initrd", str(kernel.initrd)),
            *("-append", words, "-object", "iothread,id=io"),
            *("-drive", f"file={place.root},format=raw,if=none,id=a,readonly=on,aio=io_uring"),
            *("-device", f"virtio-blk-{device},drive=a,iothread=io"),
            *("-drive", f"file={place.data},format=raw,if=none,id=b,readonly=on,aio=io_uring"),
            *("-device", f"virtio-blk-{device},drive=b,iothread=io"),
            *("-netdev", f"tap,id=n,ifname={place.tap},script=no,downscript=no"),
            *("-device", f"virtio-net-{device},netdev=n"),
        ]


VMMS = (
    Vmm("vdev, PCI", "vdev", "pci"),
    Vmm("QEMU q35", "qemu", "pci"),
    Vmm("vdev, MMIO", "vdev", "mmio"),
    Vmm("QEMU microvm", "qemu", "mmio"),
)


class Guest:
    """A guest that has booted, and stands still whenever it is not `awake`."""

    def __init__(self, vmm: Vmm, place: Place, process: asyncio.subprocess.Process) -> None:
        self.vmm = vmm
        self.place = place
        self.init = 0.0
        """Seconds since the kernel began when it ran init."""
        self._process = process
        self._said = bytearray()
        self._asked = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, command: str) -> str:
        """Has the guest's shell run a command; returns what was written since the last answer.

        Raises RuntimeError where the guest ends, TimeoutError where it does not answer.
        """
        self._asked += 1
        assert self._process.stdin is not None
        # Not the mark itself: the console may echo it.
        self._process.stdin.write(f"{command}\necho @$(({self._asked} + 0))@\n".encode())
        return await self.until(f"@{self._asked}@")

    async def until(self, mark: str) -> str:
        """What the guest says before `mark`, which is a line of its own."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_GUARD):
            while not (found := re.search(rb"%b\r?\n" % mark.encode(), self._said)):
                data = await self._process.stdout.read(1 << 16)
                if not data:
                    said = self._said.decode(errors="replace")
                    raise RuntimeError(f"{self.vmm.name} ended; the guest said:\n{said[-3000:]}")
                self._said += data
        text = self._said[: found.start()].decode(errors="replace")
        del self._said[: found.end()]
        return text

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Runs for that long."""
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.stop()

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@contextlib.asynccontextmanager
async def booted(
    vmms: Sequence[Vmm], kernel: Bootable, root: Path, data: Path
) -> AsyncIterator[list[Guest]]:
    """One guest on each, booted one after the other; they stand still."""
    async with contextlib.AsyncExitStack() as stack:
        guests = []
        for number, vmm in enumerate(vmms):
            place = Place(root, data, f"vdevperf{number}", f"10.78.{number}")
            await stack.enter_async_context(_network(place))
            process = await asyncio.create_subprocess_exec(
                *vmm.command(kernel, place),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            guest = Guest(vmm, place, process)
            stack.push_async_callback(guest.end)
            await guest.until("GUEST READY")
            said = await guest.ask("dmesg | grep 'Run .init'")
            guest.init = float(re.findall(r"\[ *([\d.]+)\] Run", said)[0])
            card = f"ip addr add {place.network}.2/24 dev eth0; ip link set eth0 up"
            await guest.ask("; ".join((card, *_MOUNTS)))
            guest.stop()
            guests.append(guest)
        yield guests


@contextlib.asynccontextmanager
async def _network(place: Place) -> AsyncIterator[None]:
    """The tap, its address, and an iperf3 server behind it."""
    await command(f"ip tuntap add {place.tap} mode tap vnet_hdr")
    try:
        await command(f"ip addr add {place.host}/24 dev {place.tap}")
        await command(f"ip link set {place.tap} up")
        server = await asyncio.create_subprocess_exec(
            *("iperf3", "-s", "-B", place.host),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,  # each load's end is an error to it
        )
        try:
            yield
        finally:
            server.kill()
            await server.wait()
    finally:
        await command(f"ip link delete {place.tap}")


async def command(text: str) -> None:
    """Raises RuntimeError where it fails."""
    process = await asyncio.create_subprocess_exec(*text.split())
    if await process.wait():
        raise RuntimeError(f"{text}: exit code {process.returncode}")
