"""A path at which a Unix socket listens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import Any

from vdev.descriptors import Descriptors
from vdev.errors import UserError

BACKLOG = 128
MAX_PATH = 107  # bytes of sockaddr_un.sun_path, less the NUL


class SocketPath:
    """A path on which a socket listens, in place of a stale one.

    sock: the caller's to close.  identity: of its file, device and inode.
    """

    identity: tuple[int, int]

    def __init__(self, path: str) -> None:
        """Raises UserError."""
        check_path(path)
        self._path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(self.sock)
            self.sock.listen(BACKLOG)
        except BaseException:
            self.sock.close()
            raise
        found = os.stat(path)
        self.identity = (found.st_dev, found.st_ino)

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """For `restore` in another process, or after an exec."""
        return {"socket": fds.put(self.sock.fileno()), "identity": self.identity}

    @classmethod
    def restore(cls, path: str, state: dict[str, Any], fds: Descriptors) -> SocketPath:
        """What `save` gave."""
        place = cls.__new__(cls)
        place._path = path
        place.sock = socket.socket(fileno=fds.take(state["socket"]))
        device, inode = state["identity"]
        place.identity = (int(device), int(inode))
        return place

    def remove(self) -> None:
        """Removes the path, unless somebody has put another socket in its place."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path)
            if (found.st_dev, found.st_ino) == self.identity:
                os.unlink(self._path)

    def _bind(self, sock: socket.socket) -> None:
        try:
            try:
                sock.bind(self._path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                self._replace_stale(sock)
        except OSError as error:
            raise UserError(_bind_failure(self._path, error)) from None

    def _replace_stale(self, sock: socket.socket) -> None:
        """One process at a time: else one would remove the socket that another has just made."""
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove_stale()
            sock.bind(self._path)
        except BlockingIOError:
            raise UserError(
                f"socket path {self._path}: another process is just replacing a socket in this "
                "folder; try again"
            ) from None
        finally:
            os.close(folder)

    def _remove_stale(self) -> None:
        if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
            raise UserError(
                f"socket path {self._path}: a file that is no socket is there; give another path "
                "or remove it"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
            except BlockingIOError:
                pass  # its backlog is full: somebody listens
        raise UserError(
            f"socket path {self._path}: another process listens on it; give another path or stop "
            "that process"
        )


def check_path(path: str) -> None:
    """Raises UserError for a path that no socket can have."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise UserError(
            f"socket path {path}: {length} bytes, but at most {MAX_PATH} fit into a socket "
            "address; give a shorter one"
        )
    if not path or "\0" in path:
        raise UserError(f"socket path {path!r}: give the path of a file")


def _bind_failure(path: str, error: OSError) -> str:
    folder = os.path.dirname(path) or "."
    if error.errno == errno.ENOENT:
        return f"socket path {path}: there is no folder {folder}; make it, or give another path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"socket path {path}: {folder} is not writable for this user; give another path"
    if error.errno == errno.ENOTDIR:
        return f"socket path {path}: {folder} is not a folder; give another path"
    return f"socket path {path}: {error.strerror}"
