"""Things that are costly to make, made once and kept under ``$XDG_CACHE_HOME/vdev``.

An entry is named by what it was made from. It is made in a directory beside its place and
renamed into it when complete, under a lock, so that neither a second run at the same time nor
one that was cut short can leave or see half an entry.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path


def directory() -> Path:
    """Where entries live; made when missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "vdev"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*recipe: str | bytes) -> str:
    """A short name for everything that an entry is made from."""
    total = hashlib.sha256()
    for part in recipe:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


async def entry(name: str, make: Callable[[Path], Awaitable[None]]) -> Path:
    """The directory of this name; when it does not exist, ``make`` fills it."""
    place = directory() / name
    if place.is_dir():
        return place
    with (directory() / f"{name}.lock").open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        if place.is_dir():
            return place
        for stale in directory().glob(f"{name}.making.*"):
            shutil.rmtree(stale)
        making = tempfile.mkdtemp(prefix=f"{name}.making.", dir=directory())
        try:
            os.chmod(making, 0o755)
            await make(Path(making))
            os.rename(making, place)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    return place
