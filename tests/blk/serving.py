"""A disk served by vdev in a process of its own, for the tests of block semantics."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Self

from tests.frontend.blk import BlkClient
from tests.frontend.server import Server

_FIEMAP = 0xC020660B
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")
_EXTENT_DELALLOC = 4
_MOST_EXTENTS = 256


class Disk:
    """`vdev blk serve` on `image`, ready for clients at `socket`."""

    def __init__(self, directory: Path, image: Path | str, *options: str) -> None:
        self.socket = directory / "disk.sock"
        self.image = Path(image)
        self.server = Server.vdev(
            *("blk", "serve", "--socket-path", self.socket, "--blk-file", image), *options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.server.close()

    def client(self, **options: object) -> BlkClient:
        return BlkClient(self.socket, **options)  # type: ignore[arg-type]


def make_image(path: Path, size: int) -> Path:
    """A file of `size` bytes without any block of its own."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def allocated(path: Path) -> int:
    """Bytes of the file that take room on its file system."""
    return path.stat().st_blocks * 512


def is_unallocated_dirty(path: Path) -> bool:
    """Whether data waits in the page cache for its blocks to be allocated.

    File systems with delayed allocation (ext4, xfs) mark such extents; they vanish with the first
    write-back, so this tells what a power failure would lose.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        request = bytearray(_FIEMAP_HEADER.size + _MOST_EXTENTS * _FIEMAP_EXTENT.size)
        _FIEMAP_HEADER.pack_into(request, 0, 0, (1 << 64) - 1, 0, 0, _MOST_EXTENTS, 0)
        fcntl.ioctl(fd, _FIEMAP, request)
    finally:
        os.close(fd)
    mapped = _FIEMAP_HEADER.unpack_from(request)[3]
    extents = _FIEMAP_EXTENT.iter_unpack(
        bytes(request[_FIEMAP_HEADER.size :][: mapped * _FIEMAP_EXTENT.size])
    )
    return any(extent[5] & _EXTENT_DELALLOC for extent in extents)


def delays_allocation(directory: Path) -> bool:
    """Whether `is_unallocated_dirty` works on this directory's file system."""
    probe = directory / "probe"
    probe.write_bytes(bytes([1]) * 65536)
    try:
        return is_unallocated_dirty(probe)
    except OSError:
        return False
    finally:
        probe.unlink()
