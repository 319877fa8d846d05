"""A machine without KVM: everything between a vCPU and a device.

`Rig` has bus, interrupts, power, serial port, plugs and RAM.  `FakeVm` stands for KVM: it hears
notifications by ioeventfd, as vCPUs would, and takes interrupts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

from tests.conftest import open_fds
from tests.frontend.memory import GuestMemory, Region
from tests.vmm.served import readable
from vdev.blk.device import BlkDevice
from vdev.blk.image import open_image
from vdev.iothread import IOThread
from vdev.registers import MMIO, PIO, Bus
from vdev.virtio.device import Device
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import MIB
from vdev.vmm.plugs import Plugged, Plugs
from vdev.vmm.power import Power
from vdev.vmm.ram import Ram
from vdev.vmm.serial import Serial
from vdev.vmm.vm import VM, Route


class FakeVm:
    """What KVM keeps of a machine's interrupts and notifications, and when it refuses."""

    def __init__(self) -> None:
        self.irqfds: dict[int, int] = {}
        self.ioeventfds: dict[tuple[int, int | None], int] = {}
        self.routes: dict[int, Route] = {}
        self.changes = 0

    def set_routes(self, routes: Sequence[Route]) -> None:
        # With 32-bit APIC ids, the lowest byte of the upper address is reserved (KVM's api.rst).
        if any(route.address >> 32 & 0xFF for route in routes):
            raise OSError(errno.EINVAL, "set_routes")
        self.routes = {route.gsi: route for route in routes}
        self.changes += 1

    def irqfd(self, fd: int, gsi: int, assign: bool) -> None:
        if not assign:
            assert self.irqfds.pop(gsi) == fd
            return
        assert gsi not in self.irqfds
        os.fstat(fd)
        self.irqfds[gsi] = fd

    def ioeventfd(
        self, fd: int, space: int, address: int, assign: bool, *, match: int | None = None
    ) -> None:
        assert space == MMIO
        key = address, match
        if not assign:
            if self.ioeventfds.pop(key, None) != fd:
                raise OSError(errno.ENOENT, "ioeventfd")
            return
        if key in self.ioeventfds:
            raise OSError(errno.EEXIST, "ioeventfd")
        self.ioeventfds[key] = fd

    def notify(self, address: int, size: int, value: int) -> bool:
        """Whether a write is a notification, which is then signalled."""
        fd = self.ioeventfds.get((address, None))
        if fd is None and size == 4:
            fd = self.ioeventfds.get((address, value))
        if fd is None:
            return False
        os.eventfd_write(fd, 1)
        return True

    def is_raised(self, gsi: int) -> bool:
        """Takes an interrupt that is there."""
        try:
            os.eventfd_read(self.irqfds[gsi])
        except BlockingIOError:
            return False
        return True

    async def raised(self, gsi: int) -> None:
        """Takes an interrupt when it is there."""
        while not self.is_raised(gsi):
            await readable(self.irqfds[gsi])

    def gsi_of(self, address: int, data: int) -> int:
        """The GSI, connected, that sends this message."""
        found = [
            route.gsi
            for route in self.routes.values()
            if (route.address, route.data) == (address, data) and route.gsi in self.irqfds
        ]
        assert len(found) == 1, f"{len(found)} lines send {data:#x} to {address:#x}"
        return found[0]


class Faults(logging.Handler):
    """What handlers of accesses failed with."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Rig:
    """A machine of 32 MiB over `FakeVm`, within `async with`; it leaves no descriptor open."""

    def __init__(self, *, pci: bool = True) -> None:
        self.is_pci = pci
        self.outcomes: list[str] = []
        self.output = bytearray()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        stack = self._stack
        self._before = held()
        self.heard = asyncio.Event()
        self.faults = Faults()
        logging.getLogger("vdev.registers").addHandler(self.faults)
        self.ram = Ram(32 * MIB)
        stack.callback(self.ram.close)
        self.memory = GuestMemory(Region(0, self.ram.size, fd=self.ram.fd))
        stack.callback(self.memory.close)
        self.bus = Bus()
        stack.callback(self.bus.close)
        self.interrupts = Interrupts()
        stack.callback(self.interrupts.close)
        self.serial = Serial(self.bus, self.interrupts, self._hear)
        stack.callback(self.serial.close)
        self.power = Power(
            self.bus,
            self.interrupts,
            shutdown=lambda: self.outcomes.append("shutdown"),
            reset=lambda: self.outcomes.append("reset"),
            panic=lambda: self.outcomes.append("panic"),
            ejected=self._ejected,
        )
        stack.callback(self.power.close)
        self.iothread = IOThread(poll_us=0, io_uring=False)
        self.iothread.start()
        stack.push_async_callback(self.iothread.close)
        self.plugs = Plugs(self.bus, self.interrupts, self.ram.memory, pci=self.is_pci)
        stack.callback(self.plugs.close)
        stack.push_async_callback(self.plugs.clear)
        self.vm = FakeVm()
        self.attach()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        logging.getLogger("vdev.registers").removeHandler(self.faults)
        assert self.faults.said == []
        after = held()
        assert after == self._before, (after - self._before, self._before - after)
        assert not self.vm.ioeventfds or not self.is_pci
        assert not self.vm.irqfds

    def attach(self) -> None:
        self.interrupts.attach(cast(VM, self.vm))
        self.plugs.attach(cast(VM, self.vm))

    def plug(self, id: str, device: Device) -> Plugged:
        """The device is closed with the rig, or when it is unplugged."""
        stack = contextlib.AsyncExitStack()
        stack.callback(device.close)
        return self.plugs.plug(id, id, device, stack)

    def disk(self, path: Path, size: int = MIB, *, num_queues: int = 1) -> BlkDevice:
        """A disk over a new file."""
        path.write_bytes(b"")
        os.truncate(path, size)
        image = open_image(str(path))
        return BlkDevice(image, iothreads=[self.iothread], num_queues=num_queues, engine="threads")

    def _hear(self, data: bytes) -> None:
        self.output.extend(data)
        self.heard.set()

    async def _ejected(self, slot: int) -> None:
        self.outcomes.append(f"ejected {slot}")
        plugged = self.plugs.at(slot)
        if plugged is not None:
            await self.plugs.unplug(plugged)

    # A vCPU

    async def read(self, address: int, size: int) -> int:
        return await self.bus.access(MMIO, address, size)

    async def write(self, address: int, size: int, value: int) -> None:
        if not self.vm.notify(address, size, value):
            await self.bus.access(MMIO, address, size, value)

    async def inb(self, port: int, size: int = 1) -> int:
        return await self.bus.access(PIO, port, size)

    async def outb(self, port: int, value: int, size: int = 1) -> None:
        await self.bus.access(PIO, port, size, value)


def held() -> Counter[str]:
    """Open descriptors, RAM's apart: it is unmapped when nobody knows it any more, and asyncio's
    debug log, which pytest keeps until the next test, knows everything."""
    gc.collect()
    return Counter({name: count for name, count in open_fds().items() if "guest-ram" not in name})
