"""The connection between a server and its successor: texts with any number of descriptors.

One message is a file (a memfd) of JSON, and descriptors: they go in packets, as many in each as
Linux takes, the first of all being that of the text.  The first packet says how many there are.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from vdev.descriptors import Descriptors
from vdev.errors import VdevError
from vdev.server.lines import MAX_FDS, close_fds

_HEADER = struct.Struct("=I")
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_RETRY_SECONDS = 0.001


class PassageFailed(VdevError):
    """The other end is gone, is not one of ours, or says what is wrong."""


class Passage:
    """One end; owns the socket. One task uses it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """The sockets of both ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def send(self, what: str, value: Any = None, fds: Descriptors | None = None) -> None:
        """Sends a message of that name; `fds` stay the caller's. Raises PassageFailed."""
        text = os.memfd_create("vdev-passage", os.MFD_CLOEXEC)
        try:
            _write(text, {"what": what, "value": value})
            every = [text, *(fds.all() if fds is not None else ())]
            for start in range(0, len(every), MAX_FDS):
                await self._send(_HEADER.pack(len(every)), every[start : start + MAX_FDS])
        except OSError as error:
            raise PassageFailed(f"{what!r} cannot be sent: {error.strerror}") from None
        finally:
            os.close(text)

    async def receive(self, what: str) -> tuple[Any, Descriptors]:
        """The next message, which must have that name; its descriptors are the caller's.

        Raises PassageFailed.
        """
        fds: list[int] = []
        try:
            count = await self._receive(what, fds)
            while len(fds) < count:
                await self._receive(what, fds)
            message = _read(fds.pop(0))
        except BaseException:
            close_fds(fds)
            raise
        if message["what"] != what:
            close_fds(fds)
            if message["what"] == "failed":
                raise PassageFailed(str(message["value"]))
            raise PassageFailed(f"{message['what']!r:.40} came where {what} was due")
        return message["value"], Descriptors(fds)

    async def withdraw(self, what: str) -> bool:
        """Whether a message of that name has come; if not, it cannot come any more."""
        self._sock.shutdown(socket.SHUT_RD)
        try:
            await self.receive(what)
        except PassageFailed:
            return False
        return True

    async def closed(self) -> None:
        """Returns when the other end says no more."""
        with contextlib.suppress(PassageFailed):
            while True:
                await self._receive("the end", [])

    def close(self) -> None:
        """Closes the socket; may be called twice."""
        self._sock.close()

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        while True:
            try:
                self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
            except OSError as error:
                # More under way than one user may have, until the other end has taken some.
                if error.errno != errno.ETOOMANYREFS:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    async def _receive(self, what: str, fds: list[int]) -> int:
        """Adds those of one packet; returns how many there are in all."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _HEADER.size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
            except OSError:
                data, ancillary, flags = b"", [], 0
                break
        came = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came.frombytes(payload[: len(payload) - len(payload) % came.itemsize])
        fds += came
        if flags & socket.MSG_CTRUNC:
            raise PassageFailed(f"{what}: descriptors were lost: more than a process may open")
        if not data:
            raise PassageFailed(f"{what!r} did not come: the other end has gone (see its output)")
        if len(data) != _HEADER.size or not came:
            raise PassageFailed(f"{what}: no packet of vdev's")
        return int(_HEADER.unpack(data)[0])

    async def _wait(self, watch: Any, forget: Any) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        watch(self._sock.fileno(), _wake, ready)
        try:
            await ready
        finally:
            with contextlib.suppress(ValueError):
                forget(self._sock.fileno())


def _write(fd: int, message: dict[str, Any]) -> None:
    with open(fd, "w", closefd=False) as file:
        json.dump(message, file)


def _read(fd: int) -> dict[str, Any]:
    with open(fd) as file:
        file.seek(0)
        try:
            message: dict[str, Any] = json.load(file)
            message["what"], message["value"]
        except (ValueError, KeyError, TypeError):
            raise PassageFailed("a text that is damaged, or not vdev's") from None
    return message


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
