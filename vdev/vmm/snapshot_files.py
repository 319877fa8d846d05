"""The files of a snapshot, as descriptors: filled, copied, described."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from vdev.vmm.layout import MIB
from vdev.vmm.ram import data_extents

VERSION = 2
FORMAT = "vdev snapshot"
MANIFEST, STATE, MEMORY, DISKS = "manifest.json", "state.json", "memory", "disks"
BLOCK = 2 * MIB
_COPY = MIB
_FICLONE = 0x40049409


def file_names(disks: Iterable[str]) -> list[str]:
    """The files of a snapshot with the disks of these ids."""
    return [MANIFEST, STATE, MEMORY, *(f"{DISKS}/{id}" for id in disks)]


def copy_file(source: int, target: int) -> None:
    """Fills an empty file: by sharing blocks where the file system can, else around holes.

    Raises OSError.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
            raise
        _copy_data(source, target)


def _copy_data(old: int, new: int) -> None:
    size = os.fstat(old).st_size
    os.ftruncate(new, size)
    # Aligned in memory and in the file, since an image may be open with O_DIRECT.
    with mmap.mmap(-1, _COPY) as buffer:
        for start, end in data_extents(old, size):
            for at in range(start - start % mmap.PAGESIZE, end, _COPY):
                wanted = min(_COPY, end - at)
                if os.preadv(old, [buffer], at) < wanted:
                    raise OSError(errno.EIO, "it became shorter meanwhile")
                pwrite(new, memoryview(buffer)[:wanted], at)


def pwrite(fd: int, data: bytes | memoryview, at: int) -> None:
    """Writes all of it. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)


def describe(fd: int) -> dict[str, Any]:
    """What the manifest says of a file."""
    status = os.fstat(fd)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc32": crc_of(fd)}


def crc_of(fd: int) -> int:
    """The CRC-32 of a file; blocks that are holes are not read."""
    crc = 0
    size = os.fstat(fd).st_size
    extents = list(data_extents(fd, size))
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        is_data = any(low < end and high > start for low, high in extents)
        block = os.pread(fd, end - start, start) if is_data else bytes(end - start)
        crc = zlib.crc32(block, crc)
    return crc


def checksum(manifest: Mapping[str, Any]) -> int:
    """The CRC-32 of a manifest without its own."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
