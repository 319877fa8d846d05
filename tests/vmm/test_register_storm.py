"""A guest that writes anything anywhere, of any size and in any order, from several vCPUs at once.

`VDEV_STORM_SEEDS=7,8` and `VDEV_STORM_STEPS=100000` choose other storms; a seed replays its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from pathlib import Path

import pytest

from tests.vmm.driver import Driver, MmioDriver, PciDriver
from tests.vmm.rig import Rig
from vdev.registers import MMIO, PIO
from vdev.vmm.acpi.registers import Event
from vdev.vmm.devices.rng import RngDevice
from vdev.vmm.layout import (
    BAR_BASE,
    BAR_END,
    ECAM_BASE,
    ECAM_SIZE,
    HIGH_RAM_BASE,
    HOTPLUG_PORT,
    IOAPIC_BASE,
    LAPIC_BASE,
    MMIO_BASE,
    POWER_PORT,
    PVPANIC_PORT,
    SERIAL_PORT,
    VIRTIO_MMIO_SIZE,
)
from vdev.vmm.pci.function import PciFunction

SEEDS = [int(seed) for seed in os.environ.get("VDEV_STORM_SEEDS", "1,2").split(",")]
STEPS = int(os.environ.get("VDEV_STORM_STEPS", "8000"))
VCPUS = 4
RINGS = 0x10000
"""Rings are likely to be below, where the storm also writes to memory."""

Target = tuple[int, int, int]
_PORTS = [(SERIAL_PORT, 8), (POWER_PORT, 4), (HOTPLUG_PORT, 16), (PVPANIC_PORT, 1), (0x64, 1)]
_CORNERS = [0, BAR_BASE, BAR_END, ECAM_BASE, IOAPIC_BASE, LAPIC_BASE, HIGH_RAM_BASE, 1 << 63]


class Storm:
    def __init__(self, rig: Rig, seed: int, folder: Path) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.folder = folder
        self.plugged = 0

    def plug(self) -> None:
        self.plugged += 1
        if self.plugged % 2:
            disk = self.rig.disk(self.folder / f"disk{self.plugged}", num_queues=2)
            self.rig.plug(f"disk{self.plugged}", disk)
        else:
            self.rig.plug(f"rng{self.plugged}", RngDevice(iothreads=[self.rig.iothread]))

    def targets(self) -> list[Target]:
        found: list[Target] = [(PIO, port, size) for port, size in _PORTS]
        for plugged in self.rig.plugs:
            function = plugged.function
            if not isinstance(function, PciFunction):
                found.append((MMIO, MMIO_BASE + plugged.slot * VIRTIO_MMIO_SIZE, 0x140))
                continue
            bar = function.config.read("bar0")
            found.append((MMIO, ECAM_BASE + (plugged.slot << 15), 0x100))
            found += [
                (MMIO, bar + offset, window.size) for offset, window in function._windows.items()
            ]
            found += [(MMIO, bar + offset, 4) for offset in function.transport.notifications]
            found.append((MMIO, bar, function.bar_size))
        found.append((MMIO, ECAM_BASE, ECAM_SIZE))
        found.append((MMIO, self.random.choice(_CORNERS), 0x1000))
        return found

    def value(self, size: int) -> int:
        pick = self.random
        value = pick.choice(
            (
                0,
                1,
                pick.getrandbits(64),
                (1 << 64) - 1,
                1 << pick.randrange(64),
                pick.choice((1, 3, 0xB, 0xF, 0x4B)),
                pick.randrange(0, RINGS, 16),
                BAR_BASE + (pick.randrange(64) << 15),
                pick.choice(_CORNERS),
                0x7FF << 16 | 6,
            )
        )
        return value & (1 << 8 * size) - 1

    async def access(self) -> None:
        pick = self.random
        space, base, length = pick.choice(self.targets())
        size = pick.choice((1, 2, 4, 4, 8, pick.randrange(1, 9)))
        address = max(0, base + pick.randrange(-2, length + 1))
        if pick.random() < 0.8:
            address &= -size & (1 << 64) - 1 if size.bit_count() == 1 else -1
        value = self.value(size) if pick.random() < 0.7 else None
        if value is not None and space == MMIO and self.rig.vm.notify(address, size, value):
            return
        found = await self.rig.bus.access(space, address, size, value)
        assert 0 <= found < 1 << 8 * size

    async def sane(self) -> None:
        """A driver that comes in between, as after a kexec; others may steer it meanwhile."""
        for plugged in self.rig.plugs:
            transport = plugged.function.transport
            await transport.write_status(0)
            await transport.write_status(3)

    async def step(self) -> None:
        pick = self.random
        kind = pick.random()
        if kind < 0.90:
            await self.access()
        elif kind < 0.94:
            at, data = pick.randrange(0, RINGS, 2), pick.randbytes(pick.choice((2, 16, 64)))
            self.rig.ram.write(at, data)
        elif kind < 0.96:
            for plugged in self.rig.plugs:
                for kick in plugged.function.transport.kicks:
                    os.eventfd_write(kick, 1)
        elif kind < 0.97:
            await self.sane()
        elif kind < 0.98:
            self.rig.power.raise_event(Event.SLOTS_REQUESTED, pick.randrange(32))
        elif kind < 0.985:
            for plugged in self.rig.plugs:
                plugged.device.notify_config()
        elif len(list(self.rig.plugs)) < 3 and self.rig.is_pci:
            self.plug()

    async def machine(self) -> None:
        """What a machine does while its vCPUs stand still."""
        match self.random.randrange(4):
            case 0:
                await self.rig.plugs.suspend()
                await self.rig.plugs.resume()
            case 1:
                await self.rig.plugs.reset()
                self.rig.serial.reset()
                self.rig.power.reset()
            case 2:
                await self.rig.plugs.suspend()
                for plugged in self.rig.plugs:
                    state = plugged.function.save()
                    await plugged.function.reset()
                    # What a guest has made of its device may be no state to begin from.
                    with contextlib.suppress(ValueError):
                        plugged.function.restore(state)
                await self.rig.plugs.resume()
            case _:
                for gsi in tuple(self.rig.vm.irqfds):
                    self.rig.vm.is_raised(gsi)

    async def run(self, steps: int) -> None:
        for _ in range(steps // (25 * VCPUS)):
            await asyncio.gather(*(self._vcpu(25) for _ in range(VCPUS)))
            await self.machine()

    async def _vcpu(self, steps: int) -> None:
        for _ in range(steps):
            await self.step()


class Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1


@pytest.mark.parametrize("pci", [True, False], ids=["pci", "mmio"])
@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_that_a_guest_does_to_registers_ends_its_machine(
    seed: int, pci: bool, tmp_path: Path
) -> None:
    log = Counting()
    logging.getLogger("vdev").addHandler(log)
    try:
        async with Rig(pci=pci) as rig:
            storm = Storm(rig, seed, tmp_path)
            for _ in range(3):
                storm.plug()
            await storm.run(STEPS)
            lines, windows = len(rig.interrupts._lines), len(rig.bus._windows)
            assert lines <= 2 + 3 * 3
            assert windows <= 6 + 3 * 6
            assert len(rig.interrupts._routes) <= lines
            assert log.records <= 50 * (1 + storm.plugged)
            await rig.plugs.reset()
            await check_all(rig)
    finally:
        logging.getLogger("vdev").removeHandler(log)


async def check_all(rig: Rig) -> None:
    """Every device that is left serves a well-behaved driver."""
    # Rings of whoever was before may lie anywhere: the driver's memory begins above them.
    rig.memory.regions[0].holes = [(RINGS, rig.ram.size)]
    for plugged in rig.plugs:
        driver: Driver
        if rig.is_pci:
            driver = PciDriver(rig, plugged.slot)
            await driver.probe()
            await driver.enable_msix()
        else:
            driver = MmioDriver(rig, plugged.slot)
        await driver.start(0)
        if isinstance(plugged.device, RngDevice):
            assert await driver.request(0, driver.room(32)) == 32
        else:
            assert await driver.request(0, *driver.disk_read(0, 512)) == 513
        driver.close()
