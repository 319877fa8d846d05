"""A connected Unix stream socket on the event loop: lines with file descriptors.

The event loops' own streams know nothing of descriptors, so the socket is read without blocking
and the loop is asked only to wait; this works the same in asyncio and in uvloop.  Descriptors
belong to the line that is being read when they arrive: whoever sends some waits for the answer
before sending another line.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Iterable
from typing import Any, Self

from vdev.descriptors import Descriptors
from vdev.errors import PeerError

MAX_LINE = 1 << 16
MAX_FDS = 253
"""With one line: what Linux takes in one message (SCM_MAX_FD in include/net/scm.h)."""
STALL = 10.0
"""Seconds without a byte inside a line: half-open, and holding descriptors."""
_FD_SIZE = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)


class LineSocket:
    """Lines in, bytes out; owns the socket. One task reads and writes it.

    idle: whether it waits for a line; `save` loses nothing then.  gate: while it is not set, lines
    that have come wait as those do that have not.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.idle = True
        self.gate: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        self._bytes = bytearray()
        self._fds: list[int] = []
        self._writer: asyncio.StreamWriter | None = None

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """The socket, and what has come and was not read yet, for `restore` in another program."""
        return {
            "socket": fds.put(self.sock.fileno()),
            "bytes": self._bytes.hex(),
            "fds": [fds.put(fd) for fd in self._fds],
        }

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors) -> Self:
        """What `save` gave."""
        peer = cls(socket.socket(fileno=fds.take(state["socket"])))
        peer._bytes += bytes.fromhex(state["bytes"])
        peer._fds += [fds.take(place) for place in state["fds"]]
        return peer

    async def line(self) -> tuple[bytes, list[int]] | None:
        """The next line and its descriptors, which are then the caller's; None at the end.

        Raises PeerError where it is too long, brings too many descriptors or does not come to its
        end, OSError where the connection fails; nothing can be read afterwards.
        """
        self.idle = True
        try:
            while (end := self._bytes.find(b"\n")) < 0:
                if len(self._bytes) > MAX_LINE:
                    raise PeerError(f"a line of more than {MAX_LINE} bytes")
                if not await self._receive():
                    return None
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.idle = False
        line, fds = bytes(self._bytes[: end + 1]), self._fds
        del self._bytes[: end + 1]
        self._fds = []
        return line, fds

    async def send(self, data: bytes) -> None:
        """Sends all of it. Raises OSError where the connection fails."""
        await self._loop.sock_sendall(self.sock, data)

    async def stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection as a stream, from behind the last line on; no lines are read any more."""
        reader = asyncio.StreamReader(limit=MAX_LINE)
        reader.feed_data(bytes(self._bytes))
        protocol = asyncio.StreamReaderProtocol(reader)
        # The transport takes the socket over, and closes it.
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, self.sock)
        self._writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        return reader, self._writer

    async def close(self) -> None:
        """Closes the socket, and the descriptors of a line that never became whole."""
        self.idle = False
        close_fds(self._fds)
        self._fds = []
        if self._writer is None:
            self.sock.close()
            return
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._writer.wait_closed()

    async def _receive(self) -> bool:
        """Some more bytes; False at the end."""
        size = MAX_LINE + 1 - len(self._bytes)
        while True:
            try:
                data, ancillary, flags, _ = self.sock.recvmsg(
                    size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                await readable(self.sock, STALL if self._bytes or self._fds else None)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
                self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise PeerError("descriptors were lost: more than this process may open")
        if len(self._fds) > MAX_FDS:
            raise PeerError(f"more than {MAX_FDS} descriptors with one line")
        self._bytes += data
        return bool(data)


async def readable(sock: socket.socket, stall: float | None = None) -> None:
    """Returns when there is something to read, or to accept, which nobody has taken from it.

    Raises PeerError after `stall` seconds without.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    timer = loop.call_later(stall, _stalled, ready) if stall is not None else None
    loop.add_reader(sock.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
        if timer is not None:
            timer.cancel()


def close_fds(fds: Iterable[int]) -> None:
    """Closes each; a descriptor that fails to close is gone all the same."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _stalled(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_exception(PeerError(f"no byte for {STALL:g} s inside a line"))
