"""A dirty log of the test front-end: a memfd of bits, given with SET_LOG_BASE."""

from __future__ import annotations

import mmap
import os
from typing import Self

from . import wire
from .memory import PAGE, GuestMemory


class DirtyLog:
    """`size` bytes of bits at `offset` of a memfd; by default for all of `memory`."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        size: int | None = None,
        offset: int = 0,
        fd: int | None = None,
    ) -> None:
        last = max(region.end for region in memory.regions)
        self.size = -(-last // (8 * PAGE)) if size is None else size
        self.offset = offset
        self._memory = memory
        if fd is None:
            self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, offset + self.size)
        else:
            self.fd = os.dup(fd)
        self._map = mmap.mmap(self.fd, offset + self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._map.close()
        os.close(self.fd)

    def pack(self) -> bytes:
        return wire.LOG.pack(self.size, self.offset)

    def take(self) -> set[int]:
        """The guest addresses of the pages that are in the log, which is empty then.

        For times when no request is under way: this reads and clears in two steps. Where a ring
        says when it wants to be kicked the device may write, and log, at any time.
        """
        found = set()
        for at in self._parts():
            for n, byte in enumerate(self._map[at], at.start - self.offset):
                found |= {(8 * n + bit) * PAGE for bit in range(8) if byte >> bit & 1}
            self._map[at] = bytes(at.stop - at.start)
        return found

    def stray(self) -> int:
        """Bytes of the log's file that have marks where no memory is."""
        left = bytearray(self._map)
        for at in self._parts():
            left[at] = bytes(at.stop - at.start)
        return sum(1 for byte in left if byte)

    def _parts(self) -> list[slice]:
        """Of the log's file, for each region of memory."""
        ends = [(r.guest_addr // PAGE // 8, (r.end - 1) // PAGE // 8) for r in self._memory.regions]
        return [slice(self.offset + first, self.offset + last + 1) for first, last in ends]


def snapshot(memory: GuestMemory) -> dict[int, bytes]:
    """Guest address → content of each page of memory."""
    return {
        region.guest_addr + at: region.map[at : at + PAGE]
        for region in memory.regions
        for at in range(0, region.size, PAGE)
    }


def changes(before: dict[int, bytes], after: dict[int, bytes]) -> set[int]:
    """The pages that differ."""
    return {page for page, content in before.items() if after[page] != content}


def pages(address: int, size: int) -> set[int]:
    """The pages of these bytes."""
    return set(range(address // PAGE * PAGE, address + size, PAGE)) if size else set()
