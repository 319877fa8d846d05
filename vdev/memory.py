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
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError

ADDRESS_SPACE = 1 << 64

_MAP_ERRORS = {
    errno.EINVAL: "its size is 0 or one of its addresses wraps",
    errno.ENODEV: "it is not a regular file",
    errno.ENXIO: "the file is shorter than the region",
    errno.EACCES: "the file is not open for reading and writing",
    errno.EPERM: "the file may not be mapped for writing",
    errno.EBADF: "it is not a file that can be mapped",
    errno.EOVERFLOW: "its offset is beyond what a file can have",
}


class Region:
    """A part of a file, mapped at `guest_addr` (and at `user_addr` in the front-end).

    All sizes and addresses are in bytes.
    """

    __slots__ = ("_native", "guest_addr", "size", "user_addr")

    def __init__(self, native: Any, guest_addr: int, size: int, user_addr: int) -> None:
        self._native = native
        self.guest_addr = guest_addr
        self.size = size
        self.user_addr = user_addr

    @classmethod
    def map(cls, fd: int, *, guest_addr: int, size: int, user_addr: int, offset: int) -> Region:
        """Maps `size` bytes at `offset` of the file `fd`, which stays the caller's.

        Raises PeerError where the file or the numbers are wrong, OSError where mapping fails.
        """
        if size == 0 or any(at + size > ADDRESS_SPACE for at in (guest_addr, user_addr, offset)):
            raise PeerError(
                f"memory region at {guest_addr:#x}, {size:#x} bytes: {_MAP_ERRORS[errno.EINVAL]}"
            )
        out = ffi.new("struct vhost_region **")
        result = lib.vhost_region_map(fd, offset, guest_addr, size, out)
        if result < 0:
            reason = _MAP_ERRORS.get(-result)
            if reason is None:
                raise OSError(-result, os.strerror(-result), f"memory region at {guest_addr:#x}")
            raise PeerError(
                f"memory region at {guest_addr:#x}, {size:#x} bytes at offset {offset:#x} "
                f"of fd {fd}: {reason}"
            )
        return cls(ffi.gc(out[0], lib.vhost_region_unref), guest_addr, size, user_addr)

    def __repr__(self) -> str:
        return f"<Region guest={self.guest_addr:#x} size={self.size:#x} user={self.user_addr:#x}>"


class GuestMemory:
    """An immutable set of regions, none sharing guest or user addresses with another."""

    __slots__ = ("_by_user", "_starts", "native", "regions")

    def __init__(self, regions: Iterable[Region]) -> None:
        """Raises PeerError where two regions overlap."""
        self.regions = tuple(sorted(regions, key=lambda region: region.guest_addr))
        self._by_user = sorted(self.regions, key=lambda region: region.user_addr)
        self._starts = [region.user_addr for region in self._by_user]
        for low, high in zip(self._by_user, self._by_user[1:], strict=False):
            if low.user_addr + low.size > high.user_addr:
                raise PeerError(f"memory regions share user addresses: {low!r} and {high!r}")
        pointers = ffi.new("struct vhost_region *[]", [r._native for r in self.regions])
        out = ffi.new("struct vhost_memory **")
        result = lib.vhost_memory_new(pointers, len(self.regions), out)
        if result == -errno.EEXIST:
            raise PeerError(f"memory regions share guest addresses: {self.regions!r}")
        if result < 0:
            raise OSError(-result, os.strerror(-result), "memory table")
        self.native = ffi.gc(out[0], lib.vhost_memory_unref)

    def guest_address(self, user_addr: int, size: int) -> int:
        """The guest address of `size` bytes at `user_addr`, which one region must hold whole.

        Raises PeerError otherwise.  (Checking the first byte alone was CVE-2018-1059.)
        """
        at = bisect_right(self._starts, user_addr) - 1
        if at >= 0:
            region = self._by_user[at]
            offset = user_addr - region.user_addr
            if size <= region.size and offset <= region.size - size:
                return region.guest_addr + offset
        raise PeerError(
            f"{size} bytes at user address {user_addr:#x}: not within one memory region"
        )
