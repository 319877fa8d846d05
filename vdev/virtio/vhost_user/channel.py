"""A connected Unix stream socket on the event loop: bytes with file descriptors.

The event loops' own streams know nothing of descriptors, so the socket is read without blocking
and the loop is asked only to wait; this works the same in asyncio and in uvloop.  At most what the
decoder wants is read, so descriptors belong to the message that they arrive with.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from vdev.descriptors import Descriptors
from vdev.errors import PeerError
from vdev.virtio.vhost_user.codec import Decoder, Message

MAX_FDS = 32  # in one message; none takes more than 8
STALL = 10.0  # seconds without a byte inside a message: half-open, and holding the device
_PEER_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
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
    """Messages in, bytes out; owns the socket. One task reads and writes it.

    at_rest: set while the channel is paused and that task waits for it to go on, or it is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._unsent = b""
        self._unsent_fds: list[int] = []
        self._ready: asyncio.Future[None] | None = None
        self._going_on = asyncio.Event()
        self._going_on.set()
        self.at_rest = asyncio.Event()

    @property
    def peer_pid(self) -> int:
        """Of the process that connected."""
        size = _PEER_CREDENTIALS.size
        data = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(_PEER_CREDENTIALS.unpack(data)[0])

    async def receive(self) -> Message | None:
        """The next message, whose descriptors are then the caller's; None at the end.

        Raises PeerError where the framing is wrong or a message does not come to its end, OSError
        where the connection fails.  No descriptor is left open in either case.
        """
        await self._send_rest()
        decoder = self._decoder
        while (message := decoder.next_message()) is None:
            await self._while_paused()
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

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends all of `data`, and with its first byte `fds`, which it closes then.

        Raises OSError where the connection fails.
        """
        self._unsent, self._unsent_fds = data, list(fds)
        await self._send_rest()

    async def _send_rest(self) -> None:
        while self._unsent:
            await self._while_paused()
            fds = array.array("i", self._unsent_fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
            try:
                sent = self._sock.sendmsg([self._unsent], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._wait_writable()
                continue
            self._unsent = self._unsent[sent:]
            close_fds(self._unsent_fds)
            self._unsent_fds = []

    def hang_up(self) -> None:
        """Ends the connection: its task finds out."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket, and the descriptors of messages that never became whole."""
        close_fds(self._decoder.take_fds())
        close_fds(self._unsent_fds)
        self._unsent_fds = []
        self._sock.close()
        self.at_rest.set()

    # Another process may take the connection over, wherever in a message it is.

    def pause(self) -> None:
        """No byte is read or written from now on, until `resume`."""
        self._going_on.clear()
        if self._ready is not None:
            _wake(self._ready)

    def resume(self) -> None:
        """Ends a pause."""
        self._going_on.set()

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """The connection as it is `at_rest`, for `restore`."""
        received, received_fds = self._decoder.save()
        return {
            "socket": fds.put(self._sock.fileno()),
            "received": received.hex(),
            "received_fds": [fds.put(fd) for fd in received_fds],
            "unsent": self._unsent.hex(),
            "unsent_fds": [fds.put(fd) for fd in self._unsent_fds],
        }

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors) -> Channel:
        """What `save` gave. Raises ValueError, KeyError or TypeError where it did not."""
        channel = cls(socket.socket(fileno=fds.take(state["socket"])))
        received = bytes.fromhex(state["received"])
        channel._decoder.feed(received, [fds.take(place) for place in state["received_fds"]])
        channel._unsent = bytes.fromhex(state["unsent"])
        channel._unsent_fds = [fds.take(place) for place in state["unsent_fds"]]
        return channel

    async def _while_paused(self) -> None:
        while not self._going_on.is_set():
            self.at_rest.set()
            try:
                await self._going_on.wait()
            finally:
                self.at_rest.clear()

    def _receive(self, size: int) -> tuple[bytes, list[int], int]:
        data, ancillary, flags, _ = self._sock.recvmsg(size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_SIZE])
        return data, fds.tolist(), flags

    async def _wait_readable(self) -> None:
        fd = self._sock.fileno()
        self._ready = ready = self._loop.create_future()
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
        self._ready = ready = self._loop.create_future()
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
