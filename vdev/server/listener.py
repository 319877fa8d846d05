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
import os
import select
import socket
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from vdev.descriptors import Descriptors
from vdev.errors import UserError
from vdev.ratelog import RateLimitedLog
from vdev.server.socket_path import SocketPath, check_path

MAX_WAITING = 64
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
    def listen_fd(fd: int, name: str | None = None) -> Endpoint:
        """Takes over a listening Unix socket; name: what it is called, its path for one."""
        return _Listener(name or f"fd {fd}", _adopt(fd))

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

    @staticmethod
    def restore(state: dict[str, Any], fds: Descriptors) -> Endpoint:
        """What `save` gave, in another process; front-ends come after `open`.

        Raises ValueError, KeyError or TypeError where it did not.
        """
        kinds: tuple[type[_Listener | _PathListener | _Connected | _Connector], ...]
        kinds = (_Listener, _PathListener, _Connected, _Connector)
        return {kind.__name__: kind for kind in kinds}[state["kind"]].restored(state, fds)

    @abstractmethod
    def save(self, fds: Descriptors) -> dict[str, Any]:
        """What another process goes on with, while this one is paused."""

    def pause(self) -> None:  # noqa: B027  (where none come by themselves)
        """Gives no front-end until `resume`; those that come wait."""

    def resume(self) -> None:  # noqa: B027
        """Ends a pause."""

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
        self._paused = False
        self._log: RateLimitedLog | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def restored(cls, state: dict[str, Any], fds: Descriptors) -> Endpoint:
        listener = _Listener(state["name"], _adopt(fds.take(state["socket"])))
        listener._restore_waiting(state, fds)
        return listener

    def _restore_waiting(self, state: dict[str, Any], fds: Descriptors) -> None:
        """Whoever spoke still does: it has something to read."""
        for place in state["waiting"]:
            peer = socket.socket(fileno=fds.take(place))
            self._silent[peer.fileno()] = peer

    def save(self, fds: Descriptors) -> dict[str, Any]:
        assert self._sock is not None
        return {
            "kind": type(self).__name__,
            "name": self.name,
            "socket": fds.put(self._sock.fileno()),
            "waiting": [fds.put(s.fileno()) for s in (*self._speaking, *self._silent.values())],
        }

    def pause(self) -> None:
        assert self._loop is not None
        assert self._sock is not None
        self._paused = True
        if self._resume is not None:
            self._resume.cancel()
        for sock in (self._sock, *self._silent.values()):
            self._loop.remove_reader(sock.fileno())

    def resume(self) -> None:
        self._paused = False
        self._watch()
        self._spoke.set()

    def open(self, log: RateLimitedLog) -> None:
        assert self._sock is not None
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        self._watch()

    def _watch(self) -> None:
        assert self._loop is not None
        self._accept_again()
        for fd in self._silent:
            self._loop.add_reader(fd, self._readable, fd)

    async def next(self) -> socket.socket | None:
        while self._paused or not self._speaking:
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
        self._place: SocketPath | None = None

    @classmethod
    def restored(cls, state: dict[str, Any], fds: Descriptors) -> Endpoint:
        listener = cls(state["name"])
        listener._place = SocketPath.restore(state["name"], state, fds)
        listener._restore_waiting(state, fds)
        return listener

    def save(self, fds: Descriptors) -> dict[str, Any]:
        assert self._place is not None
        return {**super().save(fds), "identity": self._place.identity}

    @property
    def address(self) -> str:
        return os.path.abspath(self._path)

    def open(self, log: RateLimitedLog) -> None:
        if self._place is None:
            self._place = SocketPath(self._path)
        self._sock = self._place.sock
        super().open(log)

    def close(self) -> None:
        if self._place is not None:
            self._place.remove()
            self._place = None
        super().close()


class _Connected(Endpoint):
    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self._sock: socket.socket | None = sock

    @classmethod
    def restored(cls, state: dict[str, Any], fds: Descriptors) -> Endpoint:
        endpoint = cls.__new__(cls)
        endpoint.name, endpoint._sock = state["name"], None
        return endpoint

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """Its only front-end is being served."""
        return {"kind": type(self).__name__, "name": self.name}

    def open(self, log: RateLimitedLog) -> None:
        if self._sock is None:
            return
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
        self._paused = False

    @classmethod
    def restored(cls, state: dict[str, Any], fds: Descriptors) -> Endpoint:
        return cls(state["name"], bool(state["retry"]))

    def save(self, fds: Descriptors) -> dict[str, Any]:
        return {"kind": type(self).__name__, "name": self._path, "retry": self._retry}

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

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
            if self._paused:
                continue
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
