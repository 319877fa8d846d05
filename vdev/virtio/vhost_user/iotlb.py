"""Translations of I/O virtual addresses (IOVAs), as a front-end with an IOMMU tells them.

An `Iotlb` never changes: each message makes the next one.  Its entries share no IOVAs, and are
joined where they go on in each other, so that their number tells how scattered memory looks, not
how many messages there were.  A front-end answers what it is asked for, a page at a time, and may
take back everything at any time: whatever is forgotten here is asked for again.

Source: vhost-user specification, "IOMMU support" and "IOTLB message".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import ADDRESS_SPACE, guest_address
from vdev.virtio.vhost_user.layout import Part, Placement
from vdev.virtio.vhost_user.payloads import IotlbMessage, MemoryRegion

MOST_ENTRIES = 2048
"""More are not kept: it begins anew."""
READ: int = lib.VHOST_ACCESS_READ
WRITE: int = lib.VHOST_ACCESS_WRITE

_ACCESSES = (READ, WRITE, READ | WRITE)
_OF_SPLIT = (READ, READ, WRITE)
_OF_PACKED = (READ | WRITE, READ, WRITE)


class Translation(NamedTuple):
    """[iova, iova + size) is [guest_addr, guest_addr + size), within one memory region."""

    iova: int
    size: int
    guest_addr: int
    access: int
    user_addr: int

    @property
    def end(self) -> int:
        return self.iova + self.size

    def part(self, start: int, end: int) -> Translation:
        """What it says of these IOVAs, which are its own."""
        skip = start - self.iova
        return Translation(
            start, end - start, self.guest_addr + skip, self.access, self.user_addr + skip
        )

    def goes_on_in(self, other: Translation) -> bool:
        """Whether `other` says the same of what comes behind this one."""
        behind = (self.end, self.guest_addr + self.size, self.user_addr + self.size)
        return self.access == other.access and behind == (
            other.iova,
            other.guest_addr,
            other.user_addr,
        )


class Lack(NamedTuple):
    """An IOVA that is not translated for such an access."""

    iova: int
    access: int


@dataclass(frozen=True)
class Iotlb:
    """All that is known.

    extends: what the one before this said holds still.
    """

    entries: tuple[Translation, ...] = ()
    extends: bool = False

    def after(self, message: IotlbMessage, regions: Sequence[MemoryRegion]) -> Iotlb:
        """What holds after a message; `regions` are the memory. Raises PeerError."""
        if message.type == lib.VHOST_USER_IOTLB_UPDATE:
            return self._updated(message, regions)
        if message.type == lib.VHOST_USER_IOTLB_INVALIDATE:
            return self._invalidated(message)
        raise PeerError(f"type {message.type}, expected UPDATE or INVALIDATE")

    def moved(self, regions: Sequence[MemoryRegion]) -> Iotlb:
        """What is left of it in other memory."""
        left = []
        for entry in self.entries:
            try:
                guest_addr = guest_address(regions, entry.user_addr, entry.size)
            except PeerError:
                continue
            left.append(entry._replace(guest_addr=guest_addr))
        return Iotlb(tuple(left))

    def lacks(self, lack: Lack) -> bool:
        """Whether it is still not translated."""
        return self._lack(Part("", lack.iova, 1), lack.access) is not None

    def lacks_of(self, ring: Placement, *, packed: bool) -> dict[int, Lack]:
        """The first address that is lacking of each part of a ring; none: it can be served."""
        parts = zip(ring, _OF_PACKED if packed else _OF_SPLIT, strict=True)
        lacks = (self._lack(part, access) for part, access in parts)
        return {index: lack for index, lack in enumerate(lacks) if lack is not None}

    def lies(self, ring: Placement, *, packed: bool) -> list[list[tuple[int, int]]]:
        """Where the parts of a ring are, each in pieces: guest addresses and sizes."""
        parts = zip(ring, _OF_PACKED if packed else _OF_SPLIT, strict=True)
        return [self._lies(part, access) for part, access in parts]

    def _updated(self, message: IotlbMessage, regions: Sequence[MemoryRegion]) -> Iotlb:
        iova, size, user_addr, access, _ = message
        if size == 0 or iova + size >= ADDRESS_SPACE:
            raise PeerError(f"{size:#x} bytes at IOVA {iova:#x}: empty, or past the last address")
        if access not in _ACCESSES:
            raise PeerError(f"access {access}, expected one of {_ACCESSES}")
        new = Translation(iova, size, guest_address(regions, user_addr, size), access, user_addr)
        low, high, left = self._without(iova, new.end)
        pieces, extends = _laid_over(new, self.entries[low:high])
        seam = [*self.entries[max(low - 1, 0) : low], *left[0], *pieces, *left[1]]
        seam += self.entries[high : high + 1]
        joined = _joined(seam, regions)
        entries = (*self.entries[: max(low - 1, 0)], *joined, *self.entries[high + 1 :])
        return Iotlb(entries, extends) if len(entries) <= MOST_ENTRIES else Iotlb((new,))

    def _invalidated(self, message: IotlbMessage) -> Iotlb:
        # All of the address space has a size of 2^64, which wraps.
        end = message.iova + (message.size or ADDRESS_SPACE)
        if end > ADDRESS_SPACE:
            raise PeerError(f"{message.size:#x} bytes at IOVA {message.iova:#x}: not there")
        low, high, left = self._without(message.iova, end)
        entries = (*self.entries[:low], *left[0], *left[1], *self.entries[high:])
        return Iotlb(entries, extends=low == high)

    def _without(
        self, start: int, end: int
    ) -> tuple[int, int, tuple[list[Translation], list[Translation]]]:
        """Which entries have IOVAs in [start, end), from and to, and what they say besides."""
        low = self._at(start)
        high = bisect_right(self.entries, end - 1, lo=low, key=lambda entry: entry.iova)
        before: list[Translation] = []
        behind: list[Translation] = []
        if low < high and (first := self.entries[low]).iova < start:
            before.append(first.part(first.iova, start))
        if low < high and (last := self.entries[high - 1]).end > end:
            behind.append(last.part(end, last.end))
        return low, high, (before, behind)

    def _at(self, iova: int) -> int:
        """The index of the first entry that ends behind `iova`."""
        at = bisect_right(self.entries, iova, key=lambda entry: entry.iova)
        return at - 1 if at and self.entries[at - 1].end > iova else at

    def _lack(self, part: Part, access: int) -> Lack | None:
        iova = part.start
        for entry in self.entries[self._at(iova) :]:
            if entry.iova > iova or access & ~entry.access:
                break
            if entry.end >= part.start + part.size:
                return None
            iova = entry.end
        return Lack(iova, access)

    def _lies(self, part: Part, access: int) -> list[tuple[int, int]]:
        end = part.start + part.size
        pieces: list[tuple[int, int]] = []
        for entry in self.entries[self._at(part.start) :]:
            if entry.iova >= end:
                break
            if access & ~entry.access:
                continue
            piece = entry.part(max(entry.iova, part.start), min(entry.end, end))
            if pieces and sum(pieces[-1]) == piece.guest_addr:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + piece.size)
            else:
                pieces.append((piece.guest_addr, piece.size))
        return pieces


def _laid_over(new: Translation, olds: Iterable[Translation]) -> tuple[list[Translation], bool]:
    """The new one, in pieces, and whether it says of the old ones' IOVAs what they say.

    Where it does, what they allow stays allowed: a front-end may answer for each access apart.
    """
    pieces, agrees, at = [], True, new.iova
    for old in olds:
        start, end = max(old.iova, new.iova), min(old.end, new.end)
        if at < start:
            pieces.append(new.part(at, start))
        piece = new.part(start, end)
        if piece._replace(access=old.access) == old.part(start, end):
            piece = piece._replace(access=piece.access | old.access)
        else:
            agrees = False
        pieces.append(piece)
        at = end
    if at < new.end:
        pieces.append(new.part(at, new.end))
    return pieces, agrees


def _joined(entries: Iterable[Translation], regions: Sequence[MemoryRegion]) -> list[Translation]:
    joined: list[Translation] = []
    for entry in entries:
        if joined and joined[-1].goes_on_in(entry):
            both = joined[-1]._replace(size=joined[-1].size + entry.size)
            if _is_in_one(both, regions):
                joined[-1] = both
                continue
        joined.append(entry)
    return joined


def _is_in_one(entry: Translation, regions: Sequence[MemoryRegion]) -> bool:
    try:
        guest_address(regions, entry.user_addr, entry.size)
    except PeerError:
        return False
    return True
