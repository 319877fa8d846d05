"""Writing a snapshot: where its files go, and in which order they are filled."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vdev.blk.image import Image
from vdev.errors import UserError
from vdev.tables import encode
from vdev.vmm.config import MachineConfig
from vdev.vmm.ram import Ram
from vdev.vmm.snapshot_files import (
    BLOCK,
    DISKS,
    FORMAT,
    MANIFEST,
    MEMORY,
    STATE,
    VERSION,
    checksum,
    copy_file,
    describe,
    file_names,
    pwrite,
)


class Sink(Protocol):
    """Where the files of a snapshot go.

    label: what the snapshot is called in messages.  has_base: RAM's holds already what the base
    holds.
    """

    label: str
    has_base: bool

    def file(self, name: str) -> int:
        """A new file's descriptor, to write and to read, which stays the sink's.

        Raises UserError where there is no such file, OSError where it cannot be made.
        """


class Folder:
    """A `Sink` that makes a directory, which appears when the block ends without an error.

    Raises UserError where it exists already or cannot be made.
    """

    has_base = False

    def __init__(self, directory: str) -> None:
        self.label = f"snapshot {directory}"
        self._target = Path(directory)
        self._work = self._target.with_name(f".{self._target.name}.{os.getpid()}")
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        if self._target.exists():
            raise UserError(f"{self._target}: it exists; a snapshot makes its own directory")
        with explained(self.label):
            self._work.mkdir(mode=0o700)
            (self._work / DISKS).mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # It brings what nothing else needs, and a confined process makes no folder.
        import shutil

        for fd in self._fds:
            os.close(fd)
        try:
            if kind is None:
                with explained(self.label):
                    self._work.rename(self._target)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def file(self, name: str) -> int:
        with explained(self.label):
            path = self._work / name
            self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        return self._fds[-1]


class Given:
    """A `Sink` of files that somebody else has made, empty, and puts in their places."""

    label = "snapshot"

    def __init__(
        self, files: Mapping[str, int], disks: Iterable[str], *, has_base: bool = False
    ) -> None:
        """has_base: RAM's has been filled with what the base holds.

        Raises UserError unless they are those of a snapshot with these disks.
        """
        names = file_names(disks)
        if set(files) != set(names):
            raise UserError(
                f"snapshot: it has the files {', '.join(names)}; given: {', '.join(files)}"
            )
        self._files = files
        self.has_base = has_base

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """They stay whose they are."""

    def file(self, name: str) -> int:
        fd = self._files[name]
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"snapshot: what was given as {name} is no file")
        if os.fstat(fd).st_size and not (self.has_base and name == MEMORY):
            raise UserError(f"snapshot: what was given as {name} is not empty")
        return fd


def is_saved(image: Image) -> bool:
    """Whether a disk is part of a snapshot."""
    return image.kind == "file" and not image.read_only


class Writer:
    """Fills the files of a sink.

    RAM can be copied while the machine runs, from the machine or from an earlier snapshot of it,
    and what was written meanwhile once more when it stands still.  All of it blocks; what cannot
    be written is a UserError.
    """

    def __init__(self, sink: Sink, ram: Ram) -> None:
        self._sink = sink
        self._ram = ram
        self._memory = -1

    def copy_ram(self) -> None:
        """All that was ever written."""
        with explained(self._sink.label):
            self._memory = self._sink.file(MEMORY)
            os.ftruncate(self._memory, self._ram.size)
            self.copy_pages(list(self._ram.extents()))

    def copy_base(self, memory: Path) -> None:
        """What an earlier snapshot has, unless the sink has it already."""
        with explained(self._sink.label):
            self._memory = self._sink.file(MEMORY)
            if not self._sink.has_base:
                with open(memory, "rb") as base:
                    copy_file(base.fileno(), self._memory)

    def copy_pages(self, extents: Sequence[tuple[int, int]]) -> None:
        """RAM between offsets and ends in its file, in rising order."""
        remaining = list(extents)
        with explained(self._sink.label):
            for offset, view in self._ram.blocks(BLOCK):
                end = offset + len(view)
                while remaining and remaining[0][0] < end:
                    start, stop = remaining[0]
                    part = view[max(start - offset, 0) : stop - offset]
                    pwrite(self._memory, part, max(start, offset))
                    if stop > end:
                        break
                    del remaining[0]

    def finish(
        self, config: MachineConfig, state: Mapping[str, Any], disks: Mapping[str, int]
    ) -> None:
        """The rest, while the machine stands still; disks: id → descriptor of the image."""
        files: dict[str, dict[str, Any]] = {}

        def file(name: str, fill: Callable[[int], None]) -> None:
            fd = self._sink.file(name)
            fill(fd)
            os.fsync(fd)
            files[name] = describe(fd)

        with explained(self._sink.label):
            for id, source in disks.items():
                file(f"{DISKS}/{id}", partial(copy_file, source))
            os.fsync(self._memory)
            files[MEMORY] = describe(self._memory)
            text = json.dumps(state, sort_keys=True).encode()
            file(STATE, partial(_write_all, text))
            files[STATE] = {"size": len(text), "crc32": zlib.crc32(text)}
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "config": encode(config),
                "files": files,
            }
            manifest["checksum"] = checksum(manifest)
            file(MANIFEST, partial(_write_all, json.dumps(manifest, indent=1).encode()))


@contextlib.contextmanager
def explained(label: str) -> Iterator[None]:
    """What cannot be written is a UserError about `label`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{label}: {error.strerror or error}") from None


def _write_all(data: bytes, fd: int) -> None:
    pwrite(fd, data, 0)
