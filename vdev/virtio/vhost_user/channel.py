"""A connected Unix stream socket on the event loop: bytes with file descriptors.

The event loops' own streams know nothing of descriptors, so the socket is read without blocking
and the loop is asked only to wait; this works the same in asyncio and in uvloop.  At most what the
decoder wants is read, so descriptors belong to the message that they arrive with.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterable

from vdev.errors import PeerError
from vdev.virtio.vhost_user.codec import Decoder, Message

MAX_FDS = 32  # in one message; none takes more than 8
STALL = 10.0  # seconds without a byte inside a message: half-open, and holding the device
_FD_SIZE = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)


def close_fds(fds: Iterable[int]) -> None:
    """Closes each; a descriptor that fails to close is gone all the same."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


class Channel:
    """Messages in, bytes out; owns the socket. One task reads and writes it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()

    async def receive(self) -> Message | None:
        """The next message, whose descriptors are then the caller's; None at the end.

        Raises PeerError where the framing is wrong or a message does not come to its end, OSError
        where the connection fails.  No descriptor is left open in either case.
        """
        decoder = self._decoder
        while (message := decoder.next_message()) is None:
            try:
                data, fds, flags = self._receive(decoder.wanted)
            except BlockingIOError:
                await self._wait_readable()
                continue
            try:
                if flags & socket.MSG_CTRUNC:
                    raise PeerError(
                        f"file descriptors were lost: more than {MAX_FDS} with one message, or "
                        "more than this process may open"
                    )
                if not data:
                    decoder.end()
                    close_fds(fds)
                    return None
                decoder.feed(data, fds)
            except PeerError:
                close_fds({*fds, *decoder.take_fds()})
                raise
        return message

    async def send(self, data: bytes) -> None:
        """Sends all of `data`. Raises OSError where the connection fails."""
        while data:
            try:
                data = data[self._sock.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await self._wait_writable()

    def close(self) -> None:
        """Closes the socket, and the descriptors of a message that never became whole."""
        close_fds(self._decoder.take_fds())
        self._sock.close()

    def _receive(self, size: int) -> tuple[bytes, list[int], int]:
        data, ancillary, flags, _ = self._sock.recvmsg(size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
        return data, fds.tolist(), flags

    async def _wait_readable(self) -> None:
        fd = self._sock.fileno()
        ready: asyncio.Future[None] = self._loop.create_future()
        timer = self._loop.call_later(STALL, _stalled, ready) if self._decoder.inside else None
        self._loop.add_reader(fd, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(fd)
            if timer is not None:
                timer.cancel()

    async def _wait_writable(self) -> None:
        fd = self._sock.fileno()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(fd, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _stalled(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_exception(PeerError(f"no byte for {STALL:g} s inside a message"))
