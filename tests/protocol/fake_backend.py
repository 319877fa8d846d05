"""A back-end that answers as it should, but for what it is told to answer otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from vdev._native import lib
from vdev.virtio.vhost_user.codec import HEADER_SIZE, NEED_REPLY, REPLY, encode
from vdev.virtio.vhost_user.payloads import U64

FEATURES: int = (
    1 << lib.VIRTIO_F_VERSION_1
    | 1 << lib.VIRTIO_F_INDIRECT_DESC
    | 1 << lib.VHOST_USER_F_PROTOCOL_FEATURES
)
PROTOCOL: int = (
    1 << lib.VHOST_USER_PROTOCOL_F_MQ
    | 1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK
    | 1 << lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIG
    | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << lib.VHOST_USER_PROTOCOL_F_STATUS
)

Answer = Callable[[socket.socket, bytes], None]


class FakeBackend:
    """Listens on `path` and serves one front-end on a thread; `said` is what it was asked.

    answers: request → what to do with its payload instead of answering well.
    """

    def __init__(
        self,
        path: Path,
        answers: dict[int, Answer] | None = None,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
    ) -> None:
        self.answers = answers or {}
        self.said: list[int] = []
        self.features = features
        self.protocol = protocol
        self.status = 0
        self.accepted = 0
        self.connections = 0
        self.space = bytearray(range(64))
        self.channel: socket.socket | None = None
        self.sock: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._thread.join()
        self._listener.close()
        if self.channel is not None:
            self.channel.close()

    def hang_up(self) -> None:
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.sock, _ = self._listener.accept()
            self.connections += 1
            with self.sock:
                while True:
                    self._serve_one(self.sock)

    def _serve_one(self, sock: socket.socket) -> None:
        head, fds, _, _ = socket.recv_fds(sock, HEADER_SIZE, 8)
        if not head:
            raise EOFError
        request, flags, size = struct.unpack("=III", head)
        payload = sock.recv(size, socket.MSG_WAITALL) if size else b""
        if request == lib.VHOST_USER_SET_BACKEND_REQ_FD:
            self.channel = socket.socket(fileno=fds.pop())
        for fd in fds:
            os.close(fd)
        self.said.append(request)
        if request in self.answers:
            self.answers[request](sock, payload)
        elif (reply := self._reply(request, payload)) is not None:
            sock.sendall(encode(request, reply, REPLY))
        elif flags & NEED_REPLY:
            sock.sendall(encode(request, U64.encode(0), REPLY))

    def _reply(self, request: int, payload: bytes) -> bytes | None:
        if request == lib.VHOST_USER_SET_STATUS:
            self.status = U64.decode(payload)
        if request == lib.VHOST_USER_SET_FEATURES:
            self.accepted = U64.decode(payload)
        if request == lib.VHOST_USER_GET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            return payload[:12] + bytes(self.space[offset : offset + size])
        if request == lib.VHOST_USER_GET_VRING_BASE:
            return payload
        numbers = {
            lib.VHOST_USER_GET_FEATURES: self.features,
            lib.VHOST_USER_GET_PROTOCOL_FEATURES: self.protocol,
            lib.VHOST_USER_GET_QUEUE_NUM: 2,
            lib.VHOST_USER_GET_MAX_MEM_SLOTS: 8,
            lib.VHOST_USER_GET_STATUS: self.status,
        }
        return U64.encode(numbers[request]) if request in numbers else None
