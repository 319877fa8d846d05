"""vhost-user messages on a blocking unix socket, seen from the front-end.

Written from the vhost-user specification with constants of its own: it imports nothing of vdev,
so an error in vdev's codec is not cancelled out by the same error here.  Nothing is checked on the
way out: any header, any payload and any file descriptors can be sent.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

TIMEOUT = 10.0
"""Seconds after which a silent server counts as hung.  Nothing waits this long on success."""

HEADER = struct.Struct("=III")
TIMEVAL = struct.Struct("@ll")
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDR = struct.Struct("=IIQQQQ")
REGION = struct.Struct("=QQQQ")
CONFIG = struct.Struct("=III")
INFLIGHT = struct.Struct("=QQHH")
LOG = struct.Struct("=QQ")
IOTLB = struct.Struct("=QQQBB6x")

VERSION = 1
REPLY = 4
NEED_REPLY = 8
NO_FD = 0x100


class Request(enum.IntEnum):
    """Front-end requests (vhost-user specification, "Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class Protocol(enum.IntFlag):
    """Protocol feature bits."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20


class Closed(Exception):
    """The server closed the connection."""


class Hung(Exception):
    """The server neither answered nor closed the connection in time."""


@dataclass(frozen=True)
class Message:
    """One message as received; `fds` now belong to the receiver."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def u64(self) -> int:
        """The payload as a single u64; anything else is an AssertionError."""
        assert len(self.payload) == 8, f"u64 expected in the reply, got {self.payload!r}"
        value: int = U64.unpack(self.payload)[0]
        return value


def u64(value: int) -> bytes:
    return U64.pack(value)


def vring_state(index: int, num: int) -> bytes:
    return VRING_STATE.pack(index, num)


def vring_addr(
    index: int, desc: int, used: int, avail: int, *, log: int = 0, flags: int = 0
) -> bytes:
    return VRING_ADDR.pack(index, flags, desc, used, avail, log)


def region(guest_addr: int, size: int, user_addr: int, offset: int) -> bytes:
    return REGION.pack(guest_addr, size, user_addr, offset)


def mem_table(regions: Iterable[bytes], *, count: int | None = None) -> bytes:
    """The payload of SET_MEM_TABLE; `count` overrides the honest number of regions."""
    packed = list(regions)
    return struct.pack("=II", len(packed) if count is None else count, 0) + b"".join(packed)


def single_region(packed: bytes) -> bytes:
    return bytes(8) + packed


def iotlb(iova: int, size: int, user_addr: int, access: int, kind: int) -> bytes:
    return IOTLB.pack(iova, size, user_addr, access, kind)


def config(offset: int, data: bytes, *, size: int | None = None, flags: int = 0) -> bytes:
    return CONFIG.pack(offset, len(data) if size is None else size, flags) + data


def message(
    request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None
) -> bytes:
    """A whole message; `size` overrides the honest payload size."""
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


@contextlib.contextmanager
def closing_fds(fds: Iterable[int]) -> Iterator[None]:
    """Close `fds` at the end of the block."""
    held = list(fds)
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


class Wire:
    """A connected vhost-user socket, front-end side.  Blocking, every wait is bounded.

    lock: of a message and its answer, where several threads speak.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = TIMEOUT) -> None:
        self.sock = sock
        self.lock = threading.RLock()
        sock.settimeout(timeout)

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float = TIMEOUT) -> Wire:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Not settimeout: a full backlog would then be EAGAIN at once instead of a wait.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(int(timeout), 0))
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            sock.close()
            raise Hung("the server does not accept") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def half_close(self) -> None:
        """No more bytes from us; the server sees end of file where it now reads."""
        self.sock.shutdown(socket.SHUT_WR)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send `data` as it is, with `fds` on its first byte.  Raises Closed, Hung."""
        try:
            if fds:
                sent = socket.send_fds(self.sock, [data], list(fds))
                data = data[sent:]
            if data:
                self.sock.sendall(data)
        except TimeoutError:
            raise Hung("the server does not read") from None
        except (BrokenPipeError, ConnectionResetError):
            raise Closed("while sending") from None

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        self.send_raw(message(request, payload, flags=flags, size=size), fds)

    def _recv_exactly(self, count: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part, got, _, _ = socket.recv_fds(self.sock, count - len(data), 8)
            except TimeoutError:
                raise Hung("no answer") from None
            except ConnectionResetError:
                raise Closed("reset") from None
            fds.extend(got)
            if not part:
                raise Closed(f"end of file after {len(data)} of {count} bytes")
            data += part
        return data

    def recv(self) -> Message:
        """The next message of the server.  Raises Closed at end of file, Hung after the timeout."""
        fds: list[int] = []
        try:
            request, flags, size = HEADER.unpack(self._recv_exactly(HEADER.size, fds))
            payload = self._recv_exactly(size, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return Message(request, flags, payload, tuple(fds))

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a request that has a reply of its own and return the reply."""
        with self.lock:
            self.send(request, payload, fds)
            return self.reply_to(request)

    def reply_to(self, request: int) -> Message:
        reply = self.recv()
        assert reply.request == request, f"reply to {reply.request}, asked {request}"
        assert reply.flags == VERSION | REPLY, f"reply flags {reply.flags:#x}"
        return reply

    def ack_of(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with NEED_REPLY and return the acknowledgement: 0 = done, else refused."""
        with self.lock:
            self.send(request, payload, fds, flags=VERSION | NEED_REPLY)
            return self.reply_to(request).u64

    def wait_closed(self) -> None:
        """Return when the server has closed the connection.  A message instead is an
        AssertionError, silence is Hung."""
        try:
            with self.lock:
                reply = self.recv()
        except Closed:
            return
        raise AssertionError(f"the connection should have been closed, got {reply}")
