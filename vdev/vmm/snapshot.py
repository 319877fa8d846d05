"""A machine in a directory: all that another one needs to go on where this one stood.

```
manifest.json   version, configuration, and the checksums of all that follows
state.json      processors, interrupt controllers, clock, devices
memory          RAM: a file with holes, mapped by those who restore it, and copied as they write
disks/ID        the disks that could be written, as they were
```

The directory appears whole or not at all.  It may come from anybody: what stands in it is checked,
and none of its files is a link to others.  `read` checks the manifest and the state always.  Of the
large files it checks size and time of last change, which say whether anybody has touched them
since; only where those differ (a copy that did not keep times) are their checksums computed.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vdev.errors import UserError
from vdev.tables import decode
from vdev.vmm.config import MachineConfig
from vdev.vmm.layout import MIB
from vdev.vmm.snapshot_files import (
    DISKS,
    FORMAT,
    MANIFEST,
    MEMORY,
    STATE,
    VERSION,
    checksum,
    crc_of,
)

_TEXT_MAX = 64 * MIB
"""Bytes of the manifest, and of the state; that of 64 processors is a twentieth of it."""


@dataclass(frozen=True)
class Snapshot:
    """One that was read and checked."""

    directory: Path
    config: MachineConfig
    state: Mapping[str, Any]
    disks: Mapping[str, Path]

    @property
    def memory(self) -> Path:
        """The RAM, as a file of the machine's memory size."""
        return self.directory / MEMORY


def read(directory: str) -> Snapshot:
    """Checks a snapshot. Raises UserError where it is none, is of another version, or changed."""
    place = Path(directory)
    try:
        return _read(place)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{place}: not what a snapshot is like: {_brief(error)}") from None


def _read(place: Path) -> Snapshot:
    manifest = _json(place / MANIFEST, _content(place / MANIFEST))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{place}: not a snapshot of vdev")
    if type(version := manifest.get("version")) is not int or version != VERSION:
        raise UserError(
            f"{place}: a snapshot of version {_brief(version)}; this vdev reads {VERSION}"
        )
    if manifest.pop("checksum", None) != checksum(manifest):
        raise UserError(f"{place / MANIFEST}: it was changed: its checksum is another")
    config = decode(MachineConfig, manifest["config"], f"{place / MANIFEST}: ")
    # Names that no file can have; those that are not UTF-8 on this host are fine.
    os.fsencode(json.dumps(manifest["config"], ensure_ascii=False))
    files: dict[str, dict[str, Any]] = manifest["files"]
    disks = {f"{DISKS}/{disk.id}": disk.id for disk in config.disks if not disk.read_only}
    for name in files:
        if name not in (STATE, MEMORY) and name not in disks:
            raise UserError(f"{place}: a snapshot of this machine has no file {_brief(name)}")
    if files[MEMORY]["size"] != config.memory:
        raise UserError(
            f"{place}: {_brief(files[MEMORY]['size'])} bytes of RAM for {config.memory}"
        )
    text = _content(place / STATE)
    _must_be(place / STATE, len(text), files[STATE]["size"])
    if zlib.crc32(text) != files[STATE]["crc32"]:
        raise _changed(place / STATE)
    for name, known in files.items():
        if name != STATE:
            _check_file(place / name, known)
    state = _json(place / STATE, text)
    if not isinstance(state, dict) or not isinstance(state.get("devices"), dict):
        raise UserError(f"{place / STATE}: not the state of a machine")
    found = {id: place / name for name, id in disks.items() if name in files}
    return Snapshot(place, config, state, found)


def config_of(
    snapshot: Snapshot, *, name: str | None = None, disks: str | None = None, clone: bool = False
) -> MachineConfig:
    """The configuration of a machine that goes on from a snapshot.

    disks: a directory for its own copies of the disks; without it they go where they were.
    clone: another machine than the one that was, with network cards of its own addresses.
    Raises UserError.
    """
    config = snapshot.config
    if clone and (name is None or name == config.name):
        raise UserError(f"a clone of {config.name} needs a name of its own")
    if clone and disks is None and snapshot.disks:
        raise UserError(f"a clone of {config.name} needs a directory for disks of its own")
    if clone and config.nics and config.transport != "pci":
        raise UserError(
            f"a clone of {config.name} would have its network cards' addresses: "
            f"over {config.transport} they cannot be plugged in anew"
        )
    if disks is not None:
        place = Path(disks).resolve()
        if place.is_relative_to(snapshot.directory.resolve()):
            raise UserError(f"disks in {disks}: that is the snapshot, which stays as it is")
        if clone and any((place / d.id).resolve() == Path(d.path).resolve() for d in config.disks):
            raise UserError(f"disks in {disks}: those of {config.name} lie there")
    return dataclasses.replace(
        config,
        name=name or config.name,
        disks=tuple(
            dataclasses.replace(disk, path=str(Path(disks).absolute() / disk.id))
            if disks is not None and disk.id in snapshot.disks
            else disk
            for disk in config.disks
        ),
        nics=tuple(dataclasses.replace(nic, mac=None) if clone else nic for nic in config.nics),
    )


def pack(data: bytes) -> str:
    """Bytes as text for the state."""
    return base64.b64encode(data).decode()


def unpack(text: str) -> bytes:
    """Raises ValueError."""
    return base64.b64decode(text, validate=True)


def _check_file(path: Path, known: Mapping[str, Any]) -> None:
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        _must_be(path, status.st_size, known["size"])
        if status.st_mtime_ns != known["mtime_ns"] and crc_of(file.fileno()) != known["crc32"]:
            raise _changed(path)


def _must_be(path: Path, size: int, known: object) -> None:
    if size != known:
        raise UserError(f"{path}: {size} bytes, but the snapshot has {_brief(known)}")


def _changed(path: Path) -> UserError:
    return UserError(f"{path}: it was changed: its checksum is another")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of a snapshot, by itself, not by a link. Raises UserError."""
    try:
        # A pipe would have us wait.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags)
    except OSError as error:
        links = error.errno == errno.ELOOP
        why = "a link, where a snapshot has a file" if links else error.strerror
        raise UserError(f"{path}: {why}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path}: a snapshot has a file there")
    with open(fd, "rb") as file:
        yield file


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        content = file.read(_TEXT_MAX + 1)
    if len(content) > _TEXT_MAX:
        raise UserError(f"{path}: more than the {_TEXT_MAX >> 20} MiB that it can have")
    return content


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not what a snapshot has there") from None
