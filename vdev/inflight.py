"""In-flight regions: what a server that is killed has popped and not completed.

The region lies in shared memory that the front-end keeps, and gives to one back-end after another
(vhost-user, "Inflight I/O tracking").  Who writes what into it, and when, is told in
`native/src/inflight.c`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.memory import FILE_ERRORS

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAP_ERRORS = FILE_ERRORS | {errno.EINVAL: "its offset must be a multiple of 8"}


def inflight_size(num_queues: int, queue_size: int, *, packed: bool) -> int:
    """Bytes of a region for so many queues of up to so many entries, all of one layout."""
    return int(lib.vhost_inflight_size(num_queues, queue_size, packed))


def new_inflight_file(num_queues: int, queue_size: int, *, packed: bool) -> tuple[int, int]:
    """A file for a region that was never in use, which nobody can cut short; and its size.

    The descriptor is the caller's. Raises OSError.
    """
    size = inflight_size(num_queues, queue_size, packed=packed)
    fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd, size


class InflightRegion:
    """A region that queues note in what they have popped. native: `struct vhost_inflight *`."""

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        self.native = ffi.gc(native, lib.vhost_inflight_unref)

    @classmethod
    def map(
        cls, fd: int, *, offset: int, num_queues: int, queue_size: int, packed: bool
    ) -> InflightRegion:
        """The region at `offset` of the file `fd`, which stays the caller's.

        Raises PeerError where the file or the numbers are wrong, OSError where mapping fails.
        """
        out = ffi.new("struct vhost_inflight **")
        result = lib.vhost_inflight_map(fd, offset, num_queues, queue_size, packed, out)
        if reason := _MAP_ERRORS.get(-result):
            raise PeerError(f"in-flight region at offset {offset:#x} of fd {fd}: {reason}")
        if result < 0:
            raise OSError(-result, os.strerror(-result), "in-flight region")
        return cls(out[0])
