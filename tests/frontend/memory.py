"""Guest memory of the test front-end: memfd regions, an allocator, and raw access by address."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from typing import Self

from . import wire

PAGE = 4096
USER_BASE = 0x7A00_0000_0000
"""Front-end virtual addresses are made up, and differ from guest addresses, so that a server that
mixes the two address spaces fails."""

_fence_lock = threading.Lock()


def fence() -> None:
    """A full memory barrier: an uncontended lock is an atomic read-modify-write."""
    with _fence_lock:
        pass


class Region:
    """`size` bytes of a memfd, shared with the server at `guest_addr`.

    `fd`'s file begins `offset` bytes before the region, as with QEMU's split memory backends.
    """

    def __init__(self, guest_addr: int, size: int, *, offset: int = 0, fd: int | None = None):
        self.guest_addr = guest_addr
        self.size = size
        self.offset = offset
        self.user_addr = USER_BASE + guest_addr
        if fd is None:
            self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, offset + size)
        else:
            self.fd = os.dup(fd)
        self.map = mmap.mmap(self.fd, size, offset=offset)
        self.view = memoryview(self.map)
        # The first and the last page stay out of the allocator: tests place things there.
        self.holes = [(guest_addr + PAGE, guest_addr + size - PAGE)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def end(self) -> int:
        return self.guest_addr + self.size

    def pack(self) -> bytes:
        return wire.region(self.guest_addr, self.size, self.user_addr, self.offset)

    def alloc(self, size: int, align: int) -> int | None:
        for i, (low, high) in enumerate(self.holes):
            start = -(-low // align) * align
            if start + size <= high:
                self.holes[i : i + 1] = [
                    hole for hole in ((low, start), (start + size, high)) if hole[0] < hole[1]
                ]
                return start
        return None

    def release(self, address: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.holes, (address, address + size)]):
            if merged and merged[-1][1] >= low:
                assert merged[-1][1] == low, f"double free at {low:#x}"
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self.holes = merged

    def truncate(self, size: int) -> None:
        """Shorten the file.  From here on touching the lost part, by us too, is SIGBUS."""
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        self.view.release()
        self.map.close()
        os.close(self.fd)


class GuestMemory:
    """Several regions, addressed by guest physical address."""

    def __init__(self, *regions: Region) -> None:
        self.regions = list(regions)

    @classmethod
    def default(cls, size: int = 4 << 20) -> GuestMemory:
        """Two regions far apart; the first begins at address 0, as RAM of a PC does."""
        return cls(Region(0, size), Region(1 << 32, size, offset=2 * PAGE))

    def add(self, region: Region) -> Region:
        self.regions.append(region)
        return region

    def region_at(self, address: int) -> Region:
        for region in self.regions:
            if region.guest_addr <= address < region.end:
                return region
        raise ValueError(f"no guest memory at {address:#x}")

    def alloc(self, size: int, align: int = 1, *, region: Region | None = None) -> int:
        """A guest address of `size` free bytes, in `region` or the first one with room."""
        for candidate in self.regions if region is None else [region]:
            address = candidate.alloc(max(size, 1), align)
            if address is not None:
                return address
        raise MemoryError(f"no room for {size} bytes of test memory")

    def release(self, address: int, size: int) -> None:
        self.region_at(address).release(address, max(size, 1))

    def user_addr(self, address: int) -> int:
        return USER_BASE + address

    def _pieces(self, address: int, size: int) -> Iterator[tuple[Region, int, int]]:
        while size:
            region = self.region_at(address)
            count = min(size, region.end - address)
            yield region, address - region.guest_addr, count
            address += count
            size -= count

    def read(self, address: int, size: int) -> bytes:
        return b"".join(r.map[at : at + n] for r, at, n in self._pieces(address, size))

    def write(self, address: int, data: bytes) -> None:
        done = 0
        for region, at, count in self._pieces(address, len(data)):
            region.map[at : at + count] = data[done : done + count]
            done += count

    def read16(self, address: int) -> int:
        """One aligned 16-bit load, as a driver reads an index."""
        region = self.region_at(address)
        at = address - region.guest_addr
        value: int = region.view[at : at + 2].cast("H")[0]
        return value

    def write16(self, address: int, value: int) -> None:
        """One aligned 16-bit store, as a driver publishes an index."""
        region = self.region_at(address)
        at = address - region.guest_addr
        region.view[at : at + 2].cast("H")[0] = value & 0xFFFF

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions.clear()
