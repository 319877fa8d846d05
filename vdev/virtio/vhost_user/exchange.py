"""One message and its answer, over a socket that blocks: the bytes beneath a `Frontend`.

Messages go out one at a time.  A back-end may answer anything or nothing: every reply is checked
before it is read (request, flags, size) and has to be whole in time.  Where it is not, there is no
way to find the next reply, and the connection is of no more use (`failed`).

Source: vhost-user specification, "Communication".
"""

from __future__ import annotations

import array
import errno
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vdev._native import lib
from vdev.closing import Closing
from vdev.errors import PeerError
from vdev.virtio.vhost_user.codec import HEADER_SIZE, NEED_REPLY, decode_reply, encode
from vdev.virtio.vhost_user.payloads import U64, Format
from vdev.virtio.vhost_user.table import TABLE

_MOST_FDS = 4  # that are looked at in an answer: one is right
_F_REPLY_ACK: int = lib.VHOST_USER_PROTOCOL_F_REPLY_ACK


class Exchange(Closing):
    """A connection and its state.  Descriptors stay the caller's.

    All methods raise PeerError where the back-end refuses, or breaks the protocol; OSError where
    the connection fails, TimeoutError among them where an answer takes more than `answer_seconds`.

    sock: the connection, to be watched for its end while nothing is being asked.
    protocol_features: those agreed on.
    failed: why the connection is of no more use, or None.
    ended: it failed because the back-end ended it, as one does that was killed.
    """

    def __init__(self, sock: socket.socket, *, answer_seconds: float) -> None:
        """Takes over a connected stream socket."""
        self.sock = sock
        self.protocol_features = 0
        self.failed: str | None = None
        self.ended = False
        self._answer_seconds = answer_seconds

    def abort(self) -> None:
        """Ends what another thread is waiting for here; `close` is still to come."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # nobody is at the other end any more

    def close(self) -> None:
        """Ends the connection, which stops the rings."""
        self.sock.close()

    # Messages

    def ask(
        self, request: int, payload: bytes = b"", reply: Format = U64, fds: Sequence[int] = ()
    ) -> Any:
        """Sends a message that has a reply of its own; returns the value of that."""
        with self._exchange(request) as deadline:
            self._send(encode(request, payload), fds, deadline)
            return reply.decode(self._reply(request, reply, deadline))

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Sends a message without a reply, and awaits the ack where the back-end gives any."""
        acked = self.has_protocol(_F_REPLY_ACK)
        with self._exchange(request) as deadline:
            self._send(encode(request, payload, NEED_REPLY if acked else 0), fds, deadline)
            refusal = U64.decode(self._reply(request, U64, deadline)) if acked else 0
        if refusal:
            raise PeerError(f"the back-end refused {_name(request)} ({refusal:#x})")

    def has_protocol(self, bit: int) -> bool:
        """Whether a protocol feature was agreed."""
        return bool(self.protocol_features >> bit & 1)

    # Bytes

    @contextmanager
    def _exchange(self, request: int) -> Iterator[float]:
        """One message and its answer: gives the deadline.  What fails in it fails for good."""
        if self.failed is not None:
            raise OSError(errno.ENOTCONN, f"the back-end is lost: {self.failed}")
        try:
            yield time.monotonic() + self._answer_seconds
        except TimeoutError:
            self.failed = f"no answer to {_name(request)} in {self._answer_seconds:g} s"
            raise TimeoutError(errno.ETIMEDOUT, self.failed) from None
        except PeerError as error:
            self.failed = f"{_name(request)}: {error}"
            raise PeerError(f"the back-end broke the protocol: {self.failed}") from None
        except OSError as error:
            self.failed = f"{_name(request)}: {error.strerror or error}"
            self.ended = True
            raise OSError(error.errno, self.failed) from None

    def _send(self, data: bytes, fds: Sequence[int], deadline: float) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            self._wait_at_most(deadline)
            data = data[self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL) :]
            rights = []

    def _reply(
        self,
        request: int,
        reply: Format,
        deadline: float,
        *,
        may_be_empty: bool = False,
        fds: list[int] | None = None,
    ) -> bytes:
        header = decode_reply(self._read(HEADER_SIZE, deadline, fds), request)
        if may_be_empty and header.size == 0:
            return b""
        if not reply.min_size <= header.size <= reply.max_size:
            raise PeerError(f"a payload of {header.size} bytes, expected {reply.name}")
        return self._read(header.size, deadline)

    def _read(self, size: int, deadline: float, fds: list[int] | None = None) -> bytes:
        """Descriptors that come along are added to `fds`, or else closed by the kernel."""
        data = b""
        while len(data) < size:
            self._wait_at_most(deadline)
            if fds is None:
                part = self.sock.recv(size - len(data))
            else:
                part, come, _, _ = socket.recv_fds(self.sock, size - len(data), _MOST_FDS)
                fds += come
            if not part:
                raise ConnectionResetError(errno.ECONNRESET, "the back-end closed the connection")
            data += part
        return data

    def _wait_at_most(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)


def _name(request: int) -> str:
    return TABLE[request].name if request in TABLE else f"request {request}"
