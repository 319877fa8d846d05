"""The disks of a snapshot on their way back: each is there whole, or as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vdev.errors import UserError
from vdev.vmm.config import DiskConfig, MachineConfig
from vdev.vmm.snapshot import Snapshot
from vdev.vmm.snapshot_files import copy_file


@dataclass(frozen=True)
class _Copy:
    """A disk beside where it goes."""

    id: str
    work: Path
    target: Path
    fd: int


class DiskCopies:
    """Within `with`: the disks, copied beside where `config` has them, and open.

    `put` has them appear; without it all is as it was. They may be read by whom the file that they
    replace allowed, else by their owner alone. Raises UserError.
    """

    def __init__(self, snapshot: Snapshot, config: MachineConfig) -> None:
        self._snapshot = snapshot
        self._config = config
        self._copies: list[_Copy] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            for disk in self._config.disks:
                if disk.id in self._snapshot.disks:
                    self._copies.append(self._copy(disk, self._snapshot.disks[disk.id]))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def opened(self) -> Mapping[str, int]:
        """By the disks' ids: descriptors for reading and writing, open as long as this is."""
        return {copy.id: copy.fd for copy in self._copies}

    def put(self) -> None:
        """Over what is there."""
        for copy in self._copies:
            with _explained(copy.id, copy.target):
                copy.work.replace(copy.target)

    def _copy(self, disk: DiskConfig, source: Path) -> _Copy:
        target = Path(os.path.realpath(disk.path))
        work = target.with_name(f".{target.name}.{os.getpid()}")
        with _explained(disk.id, target):
            self._make_folder(target.parent)
            work.unlink(missing_ok=True)
            fd = os.open(work, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._stack.callback(os.close, fd)
            self._stack.callback(work.unlink, missing_ok=True)
            with open(source, "rb") as old:
                copy_file(old.fileno(), fd)
            os.fsync(fd)
            _allow_as(target, fd)
        return _Copy(disk.id, work, target, fd)

    def _make_folder(self, folder: Path) -> None:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            self._stack.callback(_remove_empty, place)


@contextlib.contextmanager
def _explained(id: str, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"disk {id}: {target}: {error.strerror or error}") from None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _allow_as(target: Path, fd: int) -> None:
    """Owner and permissions of an open file become those of `target`."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EEXIST, "something else than a disk's file is there")
    if os.geteuid() == 0:
        os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
