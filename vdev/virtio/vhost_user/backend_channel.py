"""The back-end channel: what we tell the front-end unasked, over the socket that it gave us.

CONFIG_CHANGE_MSG and IOTLB_MSG (MISS) are sent, and never with NEED_REPLY, so nothing is to be read
here: whatever the peer says is a breach, and closes this channel alone.  "The configuration
changed" said twice means no more than said once, and who lacks something else now lacks no more
what it lacked before.  So what waits for a peer that does not read is at most one message of each.

Source: vhost-user specification, "Back-end communication" and "Back-end message types".
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Hashable
from typing import Any, Self

from vdev._native import lib
from vdev.descriptors import Descriptors
from vdev.errors import PeerError
from vdev.ratelog import RateLimitedLog
from vdev.virtio.vhost_user.codec import encode
from vdev.virtio.vhost_user.payloads import IOTLB, IotlbMessage

_CONFIG_CHANGE = encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)


class BackendChannel:
    """Owns the socket `fd`. Raises PeerError, leaving `fd` alone, where it is no Unix stream."""

    def __init__(self, fd: int, log: RateLimitedLog) -> None:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            raise PeerError("the descriptor of the back-end channel is not a socket")
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise PeerError("the back-end channel is not a Unix stream socket")
        sock.setblocking(False)
        self._sock = sock
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._unsent = b""  # the rest of a message under way
        self._waiting: dict[Hashable, bytes] = {}  # those that are to follow
        self._paused = False
        self._loop.add_reader(fd, self._readable)

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def config_changed(self) -> None:
        """Tells the front-end to read the configuration space again; never waits."""
        self._tell(None, _CONFIG_CHANGE)

    def miss(self, whose: Hashable, iova: int, access: int) -> None:
        """Tells it of a translation that is lacking, instead of what the same one lacked before if
        that is still to be told; never waits."""
        message = IotlbMessage(iova, 0, 0, access, lib.VHOST_USER_IOTLB_MISS)
        self._tell(whose, encode(lib.VHOST_USER_BACKEND_IOTLB_MSG, IOTLB.encode(message)))

    def _tell(self, what: Hashable, message: bytes) -> None:
        if self.closed:
            return
        self._waiting[what] = message
        if not self._unsent and not self._paused:
            self._writable()

    def save(self, fds: Descriptors) -> dict[str, Any] | None:
        """The socket, and what the front-end is still to be told; None where it is closed."""
        if self.closed:
            return None
        unsent = self._unsent + b"".join(self._waiting.values())
        return {"socket": fds.put(self._sock.fileno()), "unsent": unsent.hex()}

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors, log: RateLimitedLog) -> Self:
        """What `save` gave, which goes on with `resume`.

        Raises PeerError, ValueError, KeyError or TypeError where it did not.
        """
        channel = cls(fds.take(state["socket"]), log)
        channel._unsent = bytes.fromhex(state["unsent"])
        channel._paused = True
        return channel

    def pause(self) -> None:
        """Says nothing until `resume`, not even what is to be told from now on."""
        self._paused = True
        if not self.closed:
            self._loop.remove_writer(self._sock.fileno())

    def resume(self) -> None:
        """Ends a pause."""
        self._paused = False
        if not self.closed:
            self._writable()

    def close(self) -> None:
        """Closes the socket; may be called twice."""
        if not self.closed:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    def _writable(self) -> None:
        fd = self._sock.fileno()
        try:
            while self._unsent or self._waiting:
                if not self._unsent:
                    self._unsent = self._waiting.pop(next(iter(self._waiting)))
                sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            self._loop.add_writer(fd, self._writable)
            return
        except OSError as error:
            self._log.warning("back-end channel: %s", error)
            self.close()
            return
        self._loop.remove_writer(fd)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            self._log.warning("back-end channel: %s", error)
            data = b""
        if data:
            self._log.warning("back-end channel: a reply that was not asked for; closed")
        self.close()
