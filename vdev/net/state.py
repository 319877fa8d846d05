"""The journal: what to undo in the host's network, should this process die before it does.

A tap made by us dies with its fds, but a bridge, an address or a changed setting stays.  Each is
recorded in a small file of this process when it has been made, and struck out when it is undone.
The file is locked (flock) as long as its process lives, so a journal that can be locked belongs to
a dead one, whatever the reuse of process ids; the next server that starts, or ends, undoes it.
What cannot be undone yet, since others use it, stays recorded.

Records name interfaces by name and index, which mean something in one network namespace until the
next boot only; a journal of another namespace is left alone, one of another boot is void.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdev.errors import UserError
from vdev.runtime import runtime_dir

Record = dict[str, Any]


class Journal:
    """The records of one wiring, oldest first; the file exists while there are any.

    Changed within `exclusively` only.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or runtime_dir()
        self._path = Path()
        self._fd = -1
        self.records: list[Record] = []

    @classmethod
    def inherited(cls, fd: int) -> Journal:
        """That of the file `fd`, which another process has locked, and leaves to us.

        Raises ValueError where it is none.
        """
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        journal = cls(path.parent)
        journal._path, journal._fd = path, fd
        journal.records = _content(fd)["records"]
        return journal

    def add(self, record: Record) -> None:
        """Records what to undo. Raises UserError where the directory cannot be had."""
        if self._fd < 0:
            _make_directory(self._directory)
            # A name of its own: the file may outlive this process, and its number come again.
            self._path = self._directory / f"net-{os.getpid()}-{os.urandom(4).hex()}.json"
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.records.append(record)
        self._write()

    def strike(self, record: Record) -> None:
        """Forgets a record: it was undone."""
        self.records.remove(record)
        self._write()

    def fileno(self) -> int | None:
        """Of the locked file, if anything is recorded; a duplicate keeps the lock, too."""
        return self._fd if self.records else None

    def close(self) -> None:
        """Lets go; what is still recorded is for the next server to undo."""
        if self._fd < 0:
            return
        if not self.records:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def _write(self) -> None:
        content = {"boot": _boot_id(), "netns": _netns(), "pid": os.getpid()}
        data = json.dumps({**content, "records": self.records}).encode()
        # In one write, and longer before shorter: whenever we are killed, it can be read.
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    @classmethod
    def leftovers(cls, directory: Path | None = None) -> Iterator[Journal]:
        """The journals of dead processes, each ours until the loop goes on."""
        for path in sorted((directory or runtime_dir()).glob("net-*.json")):
            journal = cls._take(path)
            if journal is None:
                continue
            try:
                yield journal
            finally:
                journal.close()

    @classmethod
    def _take(cls, path: Path) -> Journal | None:
        """The journal at `path` if its process is dead and it is of this network namespace."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = _content(fd)
        except BlockingIOError:
            os.close(fd)
            return None
        except ValueError:
            content = {}  # killed before the first record was written
        if content and content["boot"] == _boot_id() and content["netns"] != _netns():
            os.close(fd)
            return None
        journal = cls(path.parent)
        journal._path, journal._fd = path, fd
        if content.get("boot") == _boot_id():
            journal.records = content["records"]
        return journal


def _content(fd: int) -> dict[str, Any]:
    """Raises ValueError where there is none yet."""
    content: dict[str, Any]
    content, _ = json.JSONDecoder().raw_decode(os.pread(fd, 1 << 20, 0).decode())
    return content


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.lstat()
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}: vdev keeps there what it has to undo in the network"
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise UserError(f"{directory}: not a directory of ours: it belongs to uid {info.st_uid}")


@contextlib.contextmanager
def exclusively(directory: Path | None = None) -> Iterator[None]:
    """One server at a time wires or undoes: a bridge that one removes is not found by another, and
    a journal that is not locked yet is not taken for a dead process's.

    Where the directory cannot be had nothing is locked: then nothing can be recorded either.
    """
    directory = directory or runtime_dir()
    try:
        _make_directory(directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (UserError, OSError):
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _netns() -> list[int]:
    info = os.stat("/proc/thread-self/ns/net")
    return [info.st_dev, info.st_ino]
