"""Drivers in the guest of a `Rig`, which know it by accesses to its buses alone.

They do what Linux's drivers do (virtio 1.3, sections 3.1, 4.1 and 4.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from tests.frontend.packed import PackedRing
from tests.frontend.ring import Desc, Ring, SplitRing, Used
from tests.vmm.rig import Rig
from vdev.virtio.mmio import MmioTransport
from vdev.virtio.pci import PciTransport
from vdev.vmm.layout import ECAM_BASE, MMIO_BASE, MMIO_FIRST_GSI, VIRTIO_MMIO_SIZE
from vdev.vmm.mmio import MmioFunction
from vdev.vmm.pci.function import PciFunction

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1 = 1 << 32
RING_PACKED = 1 << 34
RING_SIZE = 32


class Driver(ABC):
    """A driver of a virtio device; its rings lie in the rig's RAM."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.rings: dict[int, Ring] = {}
        self.accepted = 0

    @abstractmethod
    async def status(self) -> int: ...
    @abstractmethod
    async def set_status(self, value: int) -> None: ...
    @abstractmethod
    async def offered(self) -> int: ...
    @abstractmethod
    async def accept(self, features: int) -> None: ...
    @abstractmethod
    async def generation(self) -> int: ...
    @abstractmethod
    async def config(self, offset: int, size: int) -> int: ...
    @abstractmethod
    async def set_config(self, offset: int, size: int, value: int) -> None: ...
    @abstractmethod
    async def write_queue(self, index: int, ring: Ring) -> None:
        """Tells of a ring, and enables the queue."""

    @abstractmethod
    async def kick(self, index: int) -> None: ...
    @abstractmethod
    async def interrupted(self, index: int) -> None:
        """Takes the queue's interrupt when it comes."""

    async def negotiate(self, wanted: int = VERSION_1) -> int:
        """Reset to FEATURES_OK; returns the status that is read then."""
        await self.set_status(0)
        assert await self.status() == 0
        await self.set_status(ACKNOWLEDGE)
        await self.set_status(ACKNOWLEDGE | DRIVER)
        await self.accept(wanted)
        self.accepted = wanted
        await self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return await self.status()

    async def start(self, *queues: int, features: int = VERSION_1) -> None:
        """All of section 3.1.1, each queue with a new ring."""
        assert await self.negotiate(features) == ACKNOWLEDGE | DRIVER | FEATURES_OK
        for index in queues:
            await self.set_queue(index)
        await self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    async def set_queue(self, index: int) -> Ring:
        kind = PackedRing if self.accepted & RING_PACKED else SplitRing
        if isinstance(self.rings.get(index), kind):
            self.rings[index].reset()
        else:
            self.rings[index] = kind(self.rig.memory, RING_SIZE)
        await self.write_queue(index, self.rings[index])
        return self.rings[index]

    def close(self) -> None:
        for ring in self.rings.values():
            ring.close()

    def data(self, data: bytes) -> Desc:
        address = self.rig.memory.alloc(len(data), 8)
        self.rig.memory.write(address, data)
        return Desc(address, len(data))

    def room(self, size: int) -> Desc:
        return Desc(self.rig.memory.alloc(size, 8), size, write=True)

    def content(self, desc: Desc) -> bytes:
        return self.rig.memory.read(desc.addr, desc.len)

    async def submit(self, index: int, *chain: Desc) -> int:
        ring = self.rings[index]
        head = ring.add(chain)
        ring.offer(head)
        await self.kick(index)
        return head

    async def used(self, index: int) -> Used:
        while (element := self.rings[index].pop()) is None:
            await self.interrupted(index)
        return element

    async def request(self, index: int, *chain: Desc) -> int:
        """A chain there and back; returns how many bytes were written to it."""
        head = await self.submit(index, *chain)
        element = await self.used(index)
        assert element.id == head
        return element.len

    # virtio-blk (section 5.2.6)

    def disk_read(self, sector: int, size: int) -> tuple[Desc, Desc, Desc]:
        return self._disk_head(0, sector), self.room(size), self.room(1)

    def disk_write(self, sector: int, data: bytes) -> tuple[Desc, Desc, Desc]:
        return self._disk_head(1, sector), self.data(data), self.room(1)

    def _disk_head(self, kind: int, sector: int) -> Desc:
        return self.data(kind.to_bytes(8, "little") + sector.to_bytes(8, "little"))


class PciDriver(Driver):
    """Of the function in `slot`; `probe` first."""

    def __init__(self, rig: Rig, slot: int) -> None:
        super().__init__(rig)
        self.slot = slot
        self.ecam = ECAM_BASE + (slot << 15)
        self.bar = 0
        self.capabilities: list[tuple[int, int]] = []
        self.structures: dict[int, tuple[int, int]] = {}
        self.vector_gsi: dict[int, int] = {}

    @property
    def transport(self) -> PciTransport:
        plugged = self.rig.plugs.at(self.slot)
        assert plugged is not None
        assert isinstance(plugged.function, PciFunction)
        return plugged.function.transport

    async def cfg(self, at: int, size: int) -> int:
        return await self.rig.read(self.ecam + at, size)

    async def set_cfg(self, at: int, size: int, value: int) -> None:
        await self.rig.write(self.ecam + at, size, value)

    async def probe(self) -> None:
        """Finds the function, sizes its BAR, walks its capabilities, enables memory."""
        assert await self.cfg(0, 2) == 0x1AF4
        assert await self.cfg(6, 2) & 0x10
        await self.set_cfg(4, 2, 0)
        self.bar = await self.cfg(0x10, 4)
        await self.set_cfg(0x10, 4, 0xFFFFFFFF)
        self.bar_size = -await self.cfg(0x10, 4) & 0xFFFFFFFF
        await self.set_cfg(0x10, 4, self.bar)
        self.capabilities.clear()
        at = await self.cfg(0x34, 1)
        while at:
            kind = await self.cfg(at, 1)
            self.capabilities.append((kind, at))
            assert len(self.capabilities) < 48
            if kind == 9:
                kind = await self.cfg(at + 3, 1)
                self.structures[kind] = (at, await self.cfg(at + 8, 4))
                assert kind == 5 or await self.cfg(at + 4, 1) == 0
            at = await self.cfg(at + 1, 1)
        self.msix = next(at for kind, at in self.capabilities if kind == 0x11)
        self.vectors = (await self.cfg(self.msix + 2, 2) & 0x7FF) + 1
        self.table = await self.cfg(self.msix + 4, 4)
        self.pending = await self.cfg(self.msix + 8, 4)
        self.notify_stride = await self.cfg(self.structures[2][0] + 16, 4)
        await self.set_cfg(4, 2, 6)

    async def move(self, address: int) -> None:
        await self.set_cfg(4, 2, 0)
        await self.set_cfg(0x10, 4, address)
        await self.set_cfg(4, 2, 6)
        self.bar = address

    # MSI-X

    async def enable_msix(self) -> None:
        """A message of its own for each vector, none of them masked."""
        await self.set_cfg(self.msix + 2, 2, 0xC000)
        for vector in range(self.vectors):
            await self.set_vector(vector, *self.message(vector))
        await self.set_cfg(self.msix + 2, 2, 0x8000)

    def message(self, vector: int) -> tuple[int, int]:
        return 0xFEE00000 | self.slot << 12, 0x4000 + vector

    async def set_vector(self, vector: int, address: int, data: int) -> None:
        at = self.bar + self.table + 16 * vector
        await self.rig.write(at + 12, 4, 1)
        await self.rig.write(at, 4, address & 0xFFFFFFFF)
        await self.rig.write(at + 4, 4, address >> 32)
        await self.rig.write(at + 8, 4, data)
        await self.rig.write(at + 12, 4, 0)

    async def mask(self, vector: int, masked: bool) -> None:
        await self.rig.write(self.bar + self.table + 16 * vector + 12, 4, masked)

    async def pending_bits(self) -> int:
        return await self.rig.read(self.bar + self.pending, 8)

    def gsi(self, vector: int) -> int:
        return self.rig.vm.gsi_of(*self.message(vector))

    # Driver

    async def common(self, at: int, size: int) -> int:
        return await self.rig.read(self.bar + self.structures[1][1] + at, size)

    async def set_common(self, at: int, size: int, value: int) -> None:
        await self.rig.write(self.bar + self.structures[1][1] + at, size, value)

    async def status(self) -> int:
        return await self.common(0x14, 1)

    async def set_status(self, value: int) -> None:
        await self.set_common(0x14, 1, value)

    async def offered(self) -> int:
        found = 0
        for word in range(2):
            await self.set_common(0x00, 4, word)
            found |= await self.common(0x04, 4) << 32 * word
        return found

    async def accept(self, features: int) -> None:
        for word in range(2):
            await self.set_common(0x08, 4, word)
            await self.set_common(0x0C, 4, features >> 32 * word & 0xFFFFFFFF)

    async def generation(self) -> int:
        return await self.common(0x15, 1)

    async def config(self, offset: int, size: int) -> int:
        return await self.rig.read(self.bar + self.structures[4][1] + offset, size)

    async def set_config(self, offset: int, size: int, value: int) -> None:
        await self.rig.write(self.bar + self.structures[4][1] + offset, size, value)

    async def write_queue(self, index: int, ring: Ring) -> None:
        await self.set_common(0x16, 2, index)
        assert await self.common(0x18, 2) >= ring.size
        await self.set_common(0x18, 2, ring.size)
        for at, address in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)):
            await self.set_common(at, 4, address & 0xFFFFFFFF)
            await self.set_common(at + 4, 4, address >> 32)
        await self.set_common(0x1A, 2, index)
        assert await self.common(0x1A, 2) == index
        await self.set_common(0x1C, 2, 1)

    async def kick(self, index: int) -> None:
        await self.set_common(0x16, 2, index)
        offset = await self.common(0x1E, 2) * self.notify_stride
        await self.rig.write(self.bar + self.structures[2][1] + offset, 2, index)

    async def interrupted(self, index: int) -> None:
        await self.rig.vm.raised(self.gsi(index))


class MmioDriver(Driver):
    """Of the device in MMIO slot `slot`."""

    def __init__(self, rig: Rig, slot: int) -> None:
        super().__init__(rig)
        self.slot = slot
        self.base = MMIO_BASE + slot * VIRTIO_MMIO_SIZE
        self.gsi = MMIO_FIRST_GSI + slot

    @property
    def transport(self) -> MmioTransport:
        plugged = self.rig.plugs.at(self.slot)
        assert plugged is not None
        assert isinstance(plugged.function, MmioFunction)
        return plugged.function.transport

    async def get(self, at: int) -> int:
        return await self.rig.read(self.base + at, 4)

    async def set(self, at: int, value: int) -> None:
        await self.rig.write(self.base + at, 4, value)

    async def status(self) -> int:
        return await self.get(0x70)

    async def set_status(self, value: int) -> None:
        await self.set(0x70, value)

    async def offered(self) -> int:
        found = 0
        for word in range(2):
            await self.set(0x14, word)
            found |= await self.get(0x10) << 32 * word
        return found

    async def accept(self, features: int) -> None:
        for word in range(2):
            await self.set(0x24, word)
            await self.set(0x20, features >> 32 * word & 0xFFFFFFFF)

    async def generation(self) -> int:
        return await self.get(0xFC)

    async def config(self, offset: int, size: int) -> int:
        return await self.rig.read(self.base + 0x100 + offset, size)

    async def set_config(self, offset: int, size: int, value: int) -> None:
        await self.rig.write(self.base + 0x100 + offset, size, value)

    async def write_queue(self, index: int, ring: Ring) -> None:
        await self.set(0x30, index)
        assert await self.get(0x34) >= ring.size
        await self.set(0x38, ring.size)
        for at, address in ((0x80, ring.desc), (0x90, ring.avail), (0xA0, ring.used)):
            await self.set(at, address & 0xFFFFFFFF)
            await self.set(at + 4, address >> 32)
        await self.set(0x44, 1)

    async def kick(self, index: int) -> None:
        await self.set(0x50, index)

    async def interrupted(self, index: int) -> None:
        await self.rig.vm.raised(self.gsi)
        await self.set(0x64, await self.get(0x60))


async def pci_disk(rig: Rig, path: Path, **options: Any) -> PciDriver:
    """A disk's driver with its interrupts enabled, not started."""
    plugged = rig.plug("disk", rig.disk(path, **options))
    driver = PciDriver(rig, plugged.slot)
    await driver.probe()
    await driver.enable_msix()
    return driver


async def mmio_disk(rig: Rig, path: Path, **options: Any) -> MmioDriver:
    plugged = rig.plug("disk", rig.disk(path, **options))
    return MmioDriver(rig, plugged.slot)
