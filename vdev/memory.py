"""Guest memory: mappings of the files that hold it, and immutable tables of them.

A `Region` is one mapping.  A `GuestMemory` is a snapshot of all regions at one time: changing the
memory of a guest makes a new snapshot, and each queue moves over to it when it has drained.  The
mappings live until the last snapshot and the last queue that use them are gone (the native side
counts references).

Two address spaces meet here.  Buffers in descriptors are guest physical addresses, translated by
the native side.  Ring addresses arrive as front-end virtual ("user") addresses (vhost-user,
SET_VRING_ADDR) and are translated to guest addresses here.
"""

from __future__ import annotations

import errno
import os
import weakref
from array import array
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import Any, Protocol

from vdev._native import ffi, lib
from vdev.errors import PeerError

ADDRESS_SPACE = 1 << 64
MAX_OFFSET = (1 << 63) - 1  # of off_t

FILE_ERRORS = {
    errno.ENODEV: "it is not a regular file",
    errno.ENXIO: "the file is too short",
    errno.EACCES: "the file is not open for reading and writing",
    errno.EPERM: "the file may not be mapped for writing",
    errno.EBADF: "it is not a file that can be mapped",
    errno.EOVERFLOW: "its offset is beyond what a file can have",
}
"""What is wrong with a file that libvhost does not map."""
_MAP_ERRORS = FILE_ERRORS | {errno.EINVAL: "its size is 0 or one of its addresses wraps"}


class AddressRange(Protocol):
    """`size` bytes at a guest address and at a user address: a Region, or the promise of one."""

    @property
    def guest_addr(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def user_addr(self) -> int: ...


class Region:
    """A part of a file, mapped at `guest_addr` (and at `user_addr` in the front-end).

    All sizes and addresses are in bytes.  fd: the file, its own, where other processes are to map
    it too, from `offset` on; or -1.
    """

    __slots__ = ("__weakref__", "fd", "guest_addr", "native", "offset", "size", "user_addr")

    def __init__(self, native: Any, guest_addr: int, size: int, user_addr: int) -> None:
        self.native = native
        self.guest_addr = guest_addr
        self.size = size
        self.user_addr = user_addr
        self.offset = 0
        self.fd = -1

    @classmethod
    def map(
        cls,
        fd: int,
        *,
        guest_addr: int,
        size: int,
        user_addr: int,
        offset: int,
        shared: bool = False,
        copy: bool = False,
    ) -> Region:
        """Maps `size` bytes at `offset` of the file `fd`, which stays the caller's.

        `shared`: the region keeps a descriptor of the file, to be given to other processes.
        `copy`: pages are copied when they are written; the file stays as it is, and must.

        Raises PeerError where the file or the numbers are wrong, OSError where mapping fails.
        """
        region = cls(None, guest_addr, size, user_addr)
        check_range(region)
        if offset > MAX_OFFSET - size:
            raise PeerError(f"memory region at {guest_addr:#x}: offset {offset:#x} is too large")
        out = ffi.new("struct vhost_region **")
        map_file = lib.vhost_region_map_copy if copy else lib.vhost_region_map
        result = map_file(fd, offset, guest_addr, size, out)
        if result < 0:
            reason = _MAP_ERRORS.get(-result)
            if reason is None:
                raise OSError(-result, os.strerror(-result), f"memory region at {guest_addr:#x}")
            raise PeerError(
                f"memory region at {guest_addr:#x}, {size:#x} bytes at offset {offset:#x} "
                f"of fd {fd}: {reason}"
            )
        region.native = ffi.gc(out[0], lib.vhost_region_unref)
        if shared:
            region.offset = offset
            region.fd = os.dup(fd)
            weakref.finalize(region, os.close, region.fd)
        return region

    def __repr__(self) -> str:
        return f"<Region guest={self.guest_addr:#x} size={self.size:#x} user={self.user_addr:#x}>"


class GuestMemory:
    """An immutable set of regions, none sharing guest or user addresses with another."""

    __slots__ = ("native", "regions")

    def __init__(self, regions: Iterable[Region]) -> None:
        """Raises PeerError where two regions overlap."""
        self.regions = tuple(regions)
        check_overlaps(self.regions)
        pointers = ffi.new("struct vhost_region *[]", [r.native for r in self.regions])
        out = ffi.new("struct vhost_memory **")
        result = lib.vhost_memory_new(pointers, len(self.regions), out)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "memory table")
        self.native = ffi.gc(out[0], lib.vhost_memory_unref)

    def guest_address(self, user_addr: int, size: int) -> int:
        """See the function of that name."""
        return guest_address(self.regions, user_addr, size)


class MemoryView(GuestMemory):
    """What an IOMMU shows of `memory`: a snapshot too, whose addresses are IOVAs."""

    __slots__ = ()

    def __init__(self, memory: GuestMemory, entries: Iterable[tuple[int, int, int, int]]) -> None:
        """entries: IOVA, size, guest address and access of each, in the order of their IOVAs.

        Each lies within one region.
        """
        self.regions = memory.regions
        table = array("Q", chain.from_iterable(entries))
        given = ffi.from_buffer("struct vhost_translation[]", table)
        out = ffi.new("struct vhost_memory **")
        result = lib.vhost_memory_view(memory.native, given, len(given), out)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "view of memory")
        self.native = ffi.gc(out[0], lib.vhost_memory_unref)


def check_range(what: AddressRange) -> None:
    """Raises PeerError for a range that is empty or wraps."""
    if what.size == 0:
        raise PeerError(f"memory region at {what.guest_addr:#x} of size 0")
    for kind, start in (("guest", what.guest_addr), ("user", what.user_addr)):
        if start + what.size > ADDRESS_SPACE:
            raise PeerError(
                f"memory region of {what.size:#x} bytes: from its {kind} address {start:#x} it "
                "goes past the end of the address space"
            )


def check_overlaps(ranges: Iterable[AddressRange]) -> None:
    """Raises PeerError where two ranges share guest or user addresses."""
    ranges = tuple(ranges)
    for kind, start in _KINDS:
        for low, high in pairwise(sorted(ranges, key=start)):
            if start(low) + low.size > start(high):
                raise PeerError(
                    f"memory regions share {kind} addresses: {low.size:#x} bytes at "
                    f"{start(low):#x} reach the one at {start(high):#x}"
                )


def guest_address(ranges: Iterable[AddressRange], user_addr: int, size: int) -> int:
    """The guest address of `size` bytes at `user_addr`, which one range must hold whole.

    Raises PeerError otherwise.  (Checking the first byte alone was CVE-2018-1059.)
    """
    for held in ranges:
        offset = user_addr - held.user_addr
        if offset >= 0 and offset + size <= held.size:
            return held.guest_addr + offset
    raise PeerError(f"{size} bytes at user address {user_addr:#x}: not within one memory region")


_KINDS: tuple[tuple[str, Callable[[AddressRange], int]], ...] = (
    ("guest", lambda held: held.guest_addr),
    ("user", lambda held: held.user_addr),
)
