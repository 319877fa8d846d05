"""A plug-in: servers that start well and go wrong, one that does not start, one that cannot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from perf.model import Disk, Launch, Server, Unsupported

BACKEND = Path(__file__).with_name("bad_backend.py")


class Bad(Server):
    """Goes wrong in the way that its name says."""

    def __init__(self, name: str) -> None:
        self.name = name

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        if self.name == "unable":
            raise Unsupported("unable serves nothing")
        if self.name == "stillborn":
            return Launch(["sh", "-c", "echo cannot start >&2; exit 3"])
        (disk,) = disks
        return Launch([sys.executable, str(BACKEND), self.name, str(disk.socket), str(disk.file)])


SERVERS = [Bad(name) for name in ("dies", "hangs", "lies", "fails", "stillborn", "unable")]
