"""Small archives in the format that the kernel unpacks as an initrd (cpio, "newc").

An initrd may be several archives one after the other, each padded to four bytes: what differs
from one guest to the next is appended to an initrd that is the same for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

_DIRECTORY = 0o040755
_FILE = 0o100755
_TRAILER = "TRAILER!!!"


def archive(files: Mapping[str, bytes]) -> bytes:
    """The archive of these files (by path, without a leading slash), all executable.

    Their directories are in it as well: the kernel makes none that is not named.
    """
    entries: dict[str, tuple[int, bytes]] = {}
    for path, content in files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            entries.setdefault("/".join(parts[:depth]), (_DIRECTORY, b""))
        entries[path] = (_FILE, content)
    members = [
        _member(inode, path, mode, content)
        for inode, (path, (mode, content)) in enumerate(entries.items(), start=1)
    ]
    return b"".join([*members, _member(0, _TRAILER, 0, b"")])


def appended(base: Path, files: Mapping[str, bytes], target: Path) -> Path:
    """A copy of an initrd with these files added; later files replace earlier ones."""
    shutil.copyfile(base, target)
    with target.open("ab") as output:
        output.write(b"\0" * (-output.tell() % 4))
        output.write(archive(files))
    return target


def _member(inode: int, path: str, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if mode == _DIRECTORY else 1
    # inode, mode, uid, gid, links, mtime, size, four device numbers, length of the name, check.
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
