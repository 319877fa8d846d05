"""Endpoints: where front-ends come from, one after another.

`Endpoint.listen` and `listen_fd` accept them; `connect` goes to a front-end that listens, and again
when it has left; `connected_fd` is one that is there already.

Who owns a device.  A device serves one front-end at a time, and a connection claims it with its
first byte: a connection that says nothing (a port scan, a half-open client) waits beside and locks
nobody out; one that stops inside a message is soon closed (`Channel`).  One that speaks while the
device is busy waits, its messages unread, until the device is free: so a guest that restarts need
not time its connection.  At most `MAX_WAITING` wait; beyond that the oldest silent one is closed,
or else the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
from abc import ABC, abstractmethod
from collections import deque

from vdev.errors import UserError
from vdev.ratelog import RateLimitedLog

MAX_WAITING = 64
BACKLOG = 128
MAX_PATH = 107  # bytes of sockaddr_un.sun_path, less the NUL
RETRY_FIRST = 0.1  # seconds
RETRY_MOST = 2.0


class Endpoint(ABC):
    """Gives front-ends: `open`, then `next` as often as one is wanted, then `close`."""

    name: str

    @property
    def address(self) -> str:
        """Where it is, for somebody in another folder."""
        return self.name

    @staticmethod
    def listen(path: str | os.PathLike[str]) -> Endpoint:
        """Listens on a socket path, replacing a stale one that nobody listens on any more."""
        return _PathListener(os.fspath(path))

    @staticmethod
    def listen_fd(fd: int) -> Endpoint:
        """Takes over a listening Unix socket."""
        return _Listener(f"fd {fd}", _adopt(fd))

    @staticmethod
    def connected_fd(fd: int) -> Endpoint:
        """Takes over a connected Unix socket; there is only this one front-end."""
        return _Connected(f"fd {fd}", _adopt(fd))

    @staticmethod
    def from_fd(fd: int) -> Endpoint:
        """Takes over a Unix socket, listening or connected. Raises UserError for anything else."""
        sock = _adopt(fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return _Listener(f"fd {fd}", sock)
        return _Connected(f"fd {fd}", sock)

    @staticmethod
    def connect(path: str | os.PathLike[str], retry: bool = True) -> Endpoint:
        """Connects to a front-end that listens on `path`.

        With `retry` it is waited for, and connected to again when it has left.
        """
        return _Connector(os.fspath(path), retry)

    @abstractmethod
    def open(self, log: RateLimitedLog) -> None:
        """Gets ready, in a running event loop. Raises UserError."""

    @abstractmethod
    async def next(self) -> socket.socket | None:
        """The next front-end, whose socket is then the caller's; None = no more will come."""

    @abstractmethod
    def close(self) -> None:
        """Takes no more front-ends; may be called twice."""


class _Listener(Endpoint):
    def __init__(self, name: str, sock: socket.socket | None) -> None:
        self.name = name
        self._sock = sock
        self._silent: dict[int, socket.socket] = {}
        self._speaking: deque[socket.socket] = deque()
        self._spoke = asyncio.Event()
        self._resume: asyncio.TimerHandle | None = None
        self._log: RateLimitedLog | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, log: RateLimitedLog) -> None:
        assert self._sock is not None
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    async def next(self) -> socket.socket | None:
        while not self._speaking:
            self._spoke.clear()
            await self._spoke.wait()
        return self._speaking.popleft()

    def close(self) -> None:
        if self._sock is None:
            return
        if self._resume is not None:
            self._resume.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._sock = None
        while self._silent:
            self._drop_oldest()
        while self._speaking:
            self._speaking.pop().close()

    def _accept(self) -> None:
        assert self._sock is not None
        assert self._loop is not None
        assert self._log is not None
        try:
            peer, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the connection stays in the backlog, so look later.
            self._log.warning("%s: cannot accept: %s", self.name, error)
            self._loop.remove_reader(self._sock.fileno())
            self._resume = self._loop.call_later(RETRY_FIRST, self._accept_again)
            return
        if self._waiting >= MAX_WAITING:
            self._drop_departed()
        if self._waiting >= MAX_WAITING:
            if not self._silent:
                peer.close()
                return
            self._drop_oldest()
        peer.setblocking(False)
        self._silent[peer.fileno()] = peer
        self._loop.add_reader(peer.fileno(), self._readable, peer.fileno())

    def _accept_again(self) -> None:
        if self._sock is not None and self._loop is not None:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _readable(self, fd: int) -> None:
        """It spoke, or left: a connection without a byte to read is no front-end."""
        peer = self._forget(fd)
        try:
            spoke = bool(peer.recv(1, socket.MSG_PEEK))
        except OSError:
            spoke = False
        if not spoke:
            peer.close()
            return
        self._speaking.append(peer)
        self._spoke.set()

    @property
    def _waiting(self) -> int:
        return len(self._silent) + len(self._speaking)

    def _drop_departed(self) -> None:
        """Those that spoke and hung up before their turn take no one's place."""
        poller = select.poll()
        for peer in self._speaking:
            poller.register(peer, 0)  # a hang-up is always reported
        gone = {fd for fd, _ in poller.poll(0)}
        for peer in [peer for peer in self._speaking if peer.fileno() in gone]:
            self._speaking.remove(peer)
            peer.close()

    def _drop_oldest(self) -> None:
        self._forget(next(iter(self._silent))).close()

    def _forget(self, fd: int) -> socket.socket:
        assert self._loop is not None
        self._loop.remove_reader(fd)
        return self._silent.pop(fd)


class _PathListener(_Listener):
    def __init__(self, path: str) -> None:
        super().__init__(path, None)
        self._path = path
        self._identity: tuple[int, int] | None = None

    @property
    def address(self) -> str:
        return os.path.abspath(self._path)

    def open(self, log: RateLimitedLog) -> None:
        check_path(self._path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(sock)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        found = os.stat(self._path)
        self._identity = (found.st_dev, found.st_ino)
        super().open(log)

    def close(self) -> None:
        if self._identity is not None:
            # Somebody may have put another socket in its place.
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self._path)
                if (found.st_dev, found.st_ino) == self._identity:
                    os.unlink(self._path)
            self._identity = None
        super().close()

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


class _Connected(Endpoint):
    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self._sock: socket.socket | None = sock

    def open(self, log: RateLimitedLog) -> None:
        assert self._sock is not None
        try:
            self._sock.getpeername()
        except OSError:
            raise UserError(
                f"{self.name}: a socket that is neither listening nor connected"
            ) from None

    async def next(self) -> socket.socket | None:
        sock, self._sock = self._sock, None
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class _Connector(Endpoint):
    def __init__(self, path: str, retry: bool) -> None:
        self.name = path
        self._path = path
        self._retry = retry
        self._delay = 0.0
        self._connected_at: float | None = None
        self._said: int | None = None  # the errno that was logged last
        self._closed = False

    @property
    def address(self) -> str:
        return os.path.abspath(self._path)

    def open(self, log: RateLimitedLog) -> None:
        check_path(self._path)
        self._log = log

    async def next(self) -> socket.socket | None:
        """Waits between attempts, longer each time, also where the peer hangs up at once."""
        loop = asyncio.get_running_loop()
        if self._connected_at is not None:
            if not self._retry:
                return None
            if loop.time() - self._connected_at > RETRY_MOST:
                self._delay = 0.0
        while not self._closed:
            await asyncio.sleep(self._delay)
            self._delay = min(max(RETRY_FIRST, 2 * self._delay), RETRY_MOST)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(self._path)
            except OSError as error:
                sock.close()
                if not self._retry:
                    raise UserError(
                        f"socket path {self._path}: cannot connect to a front-end there: "
                        f"{error.strerror}"
                    ) from None
                if error.errno != self._said:
                    self._said = error.errno
                    self._log.warning("%s: no front-end yet: %s", self._path, error.strerror)
                continue
            self._said = None
            self._connected_at = loop.time()
            return sock
        return None

    def close(self) -> None:
        self._closed = True


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


def _adopt(fd: int) -> socket.socket:
    """The Unix stream socket `fd`. Raises UserError where it is none."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UserError(f"fd {fd}: not a socket ({error.strerror}); pass a Unix socket") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UserError(f"fd {fd}: not a Unix stream socket; pass one")
    return sock
