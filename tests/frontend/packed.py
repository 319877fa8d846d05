"""A packed virtqueue driver in shared memory (virtio 1.3, section 2.8).

`put` and `write_slot` write what they are told, for tests that lie; the rest is a `Ring`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .memory import fence
from .ring import INDIRECT, NEXT, WRITE, Desc, Ring, Used

AVAIL = 1 << 7
USED = 1 << 15
WRAP = 1 << 15
"""The wrap counter, in indexes."""
NEW = WRAP << 16 | WRAP
"""The next index of a new ring: where SET_VRING_BASE begins."""
ENABLE, DISABLE, DESC_EVENT = 0, 1, 2
SLOT = struct.Struct("=QIHH")


def pack_table(chain: Sequence[Desc]) -> bytes:
    """The chain as an indirect table: entries in order, of whose flags only WRITE counts."""
    return b"".join(SLOT.pack(d.addr, d.len, 0, d.flags | (WRITE if d.write else 0)) for d in chain)


class PackedRing(Ring):
    """Descriptor ring and the two event suppression structures."""

    @staticmethod
    def _areas(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (16 * size, 16), (4, 4), (4, 4)

    def reset(self, base: int = 0) -> None:
        """base: as in SET_VRING_BASE; 0 = a new ring."""
        self.base = base or NEW
        self._fill = self._take = self.base & 0xFFFF
        index, wrap = self._fill & WRAP - 1, bool(self._fill & WRAP)
        for slot in range(self.size):
            # All was used: in this round, or in the one before.
            flags = AVAIL | USED if (slot < index) == wrap else 0
            self.write_slot(slot, 0, 0, 0, flags)
        self.memory.write(self.avail, bytes(4))
        self.memory.write(self.used, bytes(4))
        self._ids = list(range(self.size))
        self._added: dict[int, Sequence[Desc]] = {}
        self._lengths: dict[int, int] = {}
        self._tables: dict[int, tuple[int, int]] = {}

    def write_slot(self, slot: int, addr: int, length: int, buffer_id: int, flags: int) -> None:
        """A descriptor, whose flags are written last."""
        at = self.desc + 16 * slot
        self.memory.write(at, SLOT.pack(addr, length, buffer_id, flags)[:14])
        fence()
        self.memory.write16(at + 14, flags)

    def put(self, addr: int, length: int, buffer_id: int, flags: int) -> None:
        """The next descriptor, available: one after another, each as soon as it is written."""
        self.write_slot(self._fill & WRAP - 1, addr, length, buffer_id, flags | self._bits())
        self._fill = self._after(self._fill, 1)

    def want(self, place: int, flags: int) -> None:
        """The driver's event suppression structure."""
        self.memory.write(self.avail, struct.pack("=HH", place, flags))

    def device_wish(self) -> tuple[int, int]:
        """Place and flags of the device's."""
        place, flags = struct.unpack("=HH", self.memory.read(self.used, 4))
        return place, flags

    def want_call(self) -> None:
        self.want(self._take, DESC_EVENT)

    def add(self, chain: Sequence[Desc], *, indirect: bool = False) -> int:
        buffer_id = self._ids.pop(0)
        if indirect:
            table = pack_table(chain)
            address = self.memory.alloc(len(table), 16)
            self.memory.write(address, table)
            self._tables[buffer_id] = (address, len(table))
            chain = [Desc(address, len(table), flags=INDIRECT)]
        self._added[buffer_id] = chain
        return buffer_id

    def offer(self, *heads: int) -> None:
        """The first descriptor becomes available last."""
        entries = [
            (desc, head, NEXT if desc is not self._added[head][-1] else 0)
            for head in heads
            for desc in self._added[head]
        ]
        room = self.size - sum(self._lengths.values())
        assert len(entries) <= room, f"{len(entries)} descriptors, room for {room}"
        first = self._fill
        places = [self._after(first, n) for n in range(len(entries))]
        for place, (desc, head, following) in reversed(list(zip(places, entries, strict=True))):
            flags = desc.flags | following | (WRITE if desc.write else 0) | _available(place)
            self.write_slot(place & WRAP - 1, desc.addr, desc.len, head, flags)
        for head in heads:
            self._lengths[head] = len(self._added.pop(head))
        self._fill = self._after(first, len(entries))
        fence()

    def pop(self) -> Used | None:
        at = self.desc + 16 * (self._take & WRAP - 1)
        used = AVAIL | USED if self._take & WRAP else 0
        flags = self.memory.read16(at + 14)
        if flags & (AVAIL | USED) != used:
            return None
        fence()
        _, length, buffer_id, _ = SLOT.unpack(self.memory.read(at, SLOT.size))
        assert buffer_id in self._lengths, f"id {buffer_id} returned, but it was not in flight"
        self._take = self._after(self._take, self._lengths.pop(buffer_id))
        self._ids.append(buffer_id)
        if table := self._tables.pop(buffer_id, None):
            self.memory.release(*table)
        return Used(buffer_id, length)

    @property
    def fill(self) -> int:
        """The place of what is offered next, with its wrap counter."""
        return self._fill

    def wants_kick(self, old: int) -> bool:
        """Whether the device asked for a kick when there was `old` to `fill` to be made available
        (virtio 1.3, section 2.8.14)."""
        place, flags = self.device_wish()
        if flags != DESC_EVENT:
            return flags == ENABLE
        return self._distance(place, self._fill) - 1 < self._distance(old, self._fill)

    def _distance(self, start: int, end: int) -> int:
        """From one place to a later one; 0 stands for two rounds."""
        ahead = (end & WRAP - 1) - (start & WRAP - 1)
        if (start ^ end) & WRAP:
            ahead += self.size
        return (ahead - 1) % (2 * self.size) + 1

    @property
    def index(self) -> int:
        """What a server says that has used all that was offered."""
        return self._fill << 16 | self._fill

    def _bits(self) -> int:
        return _available(self._fill)

    def _after(self, place: int, count: int) -> int:
        index = (place & WRAP - 1) + count
        rounds, index = divmod(index, self.size)
        return index | (place & WRAP) ^ (WRAP if rounds % 2 else 0)


def _available(place: int) -> int:
    return AVAIL if place & WRAP else USED
