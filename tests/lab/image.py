"""Disk images: copies of the root file system, blank disks, and how much of one is in use."""

from __future__ import annotations

from pathlib import Path

from .process import run


async def copy(source: Path, target: Path) -> Path:
    """A copy that shares its blocks where the file system can, and keeps its holes anywhere."""
    await run("cp", "--reflink=auto", "--sparse=always", source, target)
    return target


def blank(path: Path, size: int) -> Path:
    """A disk of zeroes, all holes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def allocated(path: Path) -> int:
    """The bytes that an image takes on the host; holes take none."""
    return path.stat().st_blocks * 512
