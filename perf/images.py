"""The disks that are served: null, on tmpfs, on a disk file through the page cache or past it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.model import Unsupported

SIZE = 256 << 20
NULL_SIZE = 1 << 30
TMPFS = Path("/dev/shm")
DISK = Path(os.environ.get("PERF_DISK", "/var/tmp"))
"""Where disk images lie; the environment variable PERF_DISK names another folder."""
KINDS = ("null", "tmpfs", "disk", "disk-direct")
_BLOCK = bytes(range(256)) * 4096


@dataclass(frozen=True)
class Image:
    """A disk to serve: a file, or without one a null image of `size` bytes."""

    size: int
    file: Path | None = None
    direct: bool = False


@contextlib.contextmanager
def opened(kind: str, *, blank: bool = False, size: int = SIZE) -> Iterator[Image]:
    """An image of a kind, removed at the end.

    It is written through so that no block is a hole, or all zeroes where `blank`. Raises
    Unsupported where the host has no such place.
    """
    if kind == "null":
        yield Image(NULL_SIZE)
        return
    folder = TMPFS if kind == "tmpfs" else DISK
    if not folder.is_dir():
        raise Unsupported(f"{folder} does not exist here")
    on_tmpfs = _is_tmpfs(folder)
    if on_tmpfs != (kind == "tmpfs"):
        raise Unsupported(f"{folder} is {'on' if on_tmpfs else 'not on'} tmpfs")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="perf-", suffix=".img") as file:
        if blank:
            file.truncate(size)
        for _ in range(0 if blank else size // len(_BLOCK)):
            file.write(_BLOCK)
        file.flush()
        os.fsync(file.fileno())
        yield Image(size, Path(file.name), direct=kind == "disk-direct")


def _is_tmpfs(folder: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    kinds = {mount[1].replace("\\040", " "): mount[2] for mount in mounts}
    resolved = folder.resolve()
    return next(kinds[str(p)] for p in (resolved, *resolved.parents) if str(p) in kinds) in (
        "tmpfs",
        "ramfs",
    )
