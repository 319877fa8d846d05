"""Dirty logs: which pages of guest memory devices have written.

A guest's memory is copied while the guest runs: all of it once, then, again and again, what has
changed meanwhile.  The hypervisor knows what the CPUs changed; what devices changed they note
themselves, in a log of one bit a page of guest physical addresses.  The log is the front-end's
where it moves the guest (vhost-user, SET_LOG_BASE), and our own where we save it.

Bits are those that KVM_GET_DIRTY_LOG has, too: page n of what was asked for is bit n % 8 of byte
n / 8.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.memory import FILE_ERRORS

LOG_PAGE: int = lib.VHOST_LOG_PAGE
"""Bytes of guest memory to a bit, whatever the host's pages are."""

_NOT_LOGGED = (1 << 64) - 1
_MAP_ERRORS = FILE_ERRORS | {errno.EINVAL: "its size is 0, or its end wraps"}


class DirtyLog:
    """A log of the pages from guest address 0 on; any number of queues may write to it.

    pages: how many it has bits for.  native: `struct vhost_log *`.
    """

    __slots__ = ("native", "pages")

    def __init__(self, native: Any, pages: int) -> None:
        self.native = ffi.gc(native, lib.vhost_log_unref)
        self.pages = pages

    @classmethod
    def new(cls, pages: int) -> DirtyLog:
        """A log of our own. Raises OSError where there is no memory for it."""
        out = ffi.new("struct vhost_log **")
        _check(lib.vhost_log_new(pages, out), f"dirty log of {pages} pages")
        return cls(out[0], pages)

    @classmethod
    def map(cls, fd: int, *, offset: int, size: int) -> DirtyLog:
        """`size` bytes of bits at `offset` of the file `fd`, which stays the caller's.

        Raises PeerError where the file or the numbers are wrong, OSError where mapping fails.
        """
        out = ffi.new("struct vhost_log **")
        result = lib.vhost_log_map(fd, offset, size, out)
        if reason := _MAP_ERRORS.get(-result):
            raise PeerError(
                f"dirty log of {size:#x} bytes at offset {offset:#x} of fd {fd}: {reason}"
            )
        _check(result, "dirty log")
        return cls(out[0], 8 * size)

    def take(self, first_page: int, bits: bytearray) -> None:
        """Clears the bits of the `8 * len(bits)` pages from `first_page` on, a multiple of 8, and
        adds those that were set to `bits`: so it may hold what the hypervisor found already.

        A page that is read afterwards is as new as its bit.
        Raises ValueError where these are not pages of the log.
        """
        with ffi.from_buffer("uint8_t[]", bits, require_writable=True) as where:
            result = lib.vhost_log_take(self.native, first_page, where, 8 * len(bits))
        if result < 0:
            raise ValueError(
                f"{8 * len(bits)} pages from {first_page} on: the log has {self.pages}, and is "
                "read from a multiple of 8 on"
            )


def log_arguments(log: DirtyLog | None, used: int | None) -> tuple[Any, int]:
    """What the native side calls a log and the guest address of a used ring, or their absence."""
    return (ffi.NULL if log is None else log.native, _NOT_LOGGED if used is None else used)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
