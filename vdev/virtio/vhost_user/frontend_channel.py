"""The front-end's end of the back-end channel: what the back-end says unasked.

Only CONFIG_CHANGE_MSG means anything here; all else is refused where an ack is asked for, and
ignored where not.  A back-end that breaks the framing, or that does not read its acks, loses the
channel, and keeps its device.

Source: vhost-user specification, "Back-end communication" and "Back-end message types".
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from vdev._native import lib
from vdev.errors import PeerError
from vdev.ratelog import RateLimitedLog
from vdev.virtio.vhost_user.codec import REPLY, Decoder, Message, encode
from vdev.virtio.vhost_user.payloads import U64

_READS = 64  # before others have their turn


class FrontendChannel:
    """Owns `sock`; `config_changed` is called whenever the back-end says so."""

    def __init__(
        self, sock: socket.socket, config_changed: Callable[[], None], log: RateLimitedLog
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._config_changed = config_changed
        self._log = log
        self._decoder = Decoder()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Closes the socket; may be called twice."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _readable(self) -> None:
        decoder = self._decoder
        try:
            for _ in range(_READS):
                # Read without room for descriptors: the kernel closes those that come.
                data = self._sock.recv(decoder.wanted)
                if not data:
                    decoder.end()
                    self.close()
                    return
                decoder.feed(data)
                while (message := decoder.next_message()) is not None:
                    self._act(message)
        except BlockingIOError:
            return
        except (PeerError, OSError) as error:
            self._log.warning("channel of the back-end closed: %s", error)
            self.close()

    def _act(self, message: Message) -> None:
        known = message.request == lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
        if known:
            self._config_changed()
        if message.need_reply:
            ack = encode(message.request, U64.encode(0 if known else 1), REPLY)
            try:
                sent = self._sock.send(ack, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            if sent < len(ack):
                raise PeerError("it does not read the acks that it asks for")
