"""One connection to a back-end: messages, features, shared memory, rings.

It speaks just enough of the protocol to put split rings into shared memory, then leaves the rings
to the C drivers. It blocks: nothing else happens while it runs. The wire structures are those of
``libvhost.h``.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.closing import Closing
from vdev._native import ffi, lib

PAGE = 4096
USER_ADDR = 0x7F00_0000_0000
HEADER_SIZE = 12
RING_FEATURES = 1 << lib.VIRTIO_F_EVENT_IDX | 1 << lib.VIRTIO_F_INDIRECT_DESC
REPLY_ACK = 1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK
ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class Ring:
    """Where a split ring lies in guest memory, and its eventfds."""

    size: int
    desc: int
    avail: int
    used: int
    kick_fd: int
    call_fd: int


class Connection(Closing):
    """A negotiated connection. A context manager; raises OSError where the peer refuses.

    Guest memory is one memfd, mapped at guest address 0 and at ``USER_ADDR`` of "user" addresses.
    """

    def __init__(self, path: Path) -> None:
        """Connects to the back-end that listens on `path`."""
        self._fds: list[int] = []
        self._end = 0
        self.map: mmap.mmap | None = None
        self.memory_size = 0
        self.features = 0
        self._acks = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(ANSWER_SECONDS)
            self._socket.connect(str(path))
        except BaseException:
            self.close()
            raise

    def own(self, fd: int) -> int:
        """Closes `fd` with the connection."""
        self._fds.append(fd)
        return fd

    # -- messages ---------------------------------------------------------------------------

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        socket.send_fds(self._socket, [_header(request, len(payload), flags) + payload], fds)

    def _read(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionResetError(errno.ECONNRESET, "the back-end closed the connection")
        return data

    def reply(self, request: int) -> bytes:
        header = ffi.new("struct vhost_user_header *")
        ffi.buffer(header)[:] = self._read(HEADER_SIZE)
        if header.request != request:
            raise OSError(errno.EPROTO, f"reply to {header.request}, not to {request}")
        return self._read(header.size) if header.size else b""

    def get_u64(self, request: int) -> int:
        self.send(request)
        return int.from_bytes(self.reply(request), "little")

    def set(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Sends a message and awaits its acknowledgement, where the back-end gives any."""
        if not self._acks:
            return self.send(request, payload, fds)
        self.send(request, payload, fds, lib.VHOST_USER_NEED_REPLY)
        if int.from_bytes(self.reply(request), "little"):
            raise OSError(errno.EPROTO, f"the back-end refused request {request}")
        return None

    def barrier(self) -> None:
        """Returns once the back-end has acted on all that was sent."""
        self.get_u64(lib.VHOST_USER_GET_FEATURES)

    # -- set-up -----------------------------------------------------------------------------

    def negotiate(self, wanted: int, protocol: int) -> None:
        """Takes what the back-end offers of `wanted` features and of `protocol` features.

        Raises OSError when it lacks VIRTIO_F_VERSION_1, which the drivers rely on.
        """
        needed = 1 << lib.VIRTIO_F_VERSION_1
        self.send(lib.VHOST_USER_SET_OWNER)
        offered = self.get_u64(lib.VHOST_USER_GET_FEATURES)
        if not offered & needed:
            raise OSError(errno.EPROTO, "the back-end does not offer VIRTIO_F_VERSION_1")
        features = offered & (wanted | needed | 1 << lib.VHOST_USER_F_PROTOCOL_FEATURES)
        if features >> lib.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            taken = self.get_u64(lib.VHOST_USER_GET_PROTOCOL_FEATURES) & (protocol | REPLY_ACK)
            self.send(lib.VHOST_USER_SET_PROTOCOL_FEATURES, taken.to_bytes(8, "little"))
            self._acks = bool(taken & REPLY_ACK)
        self.set(lib.VHOST_USER_SET_FEATURES, features.to_bytes(8, "little"))
        self.features = features

    def has(self, feature: int) -> bool:
        """Whether a feature bit was negotiated."""
        return bool(self.features >> feature & 1)

    def share(self, size: int) -> None:
        """Makes guest memory of `size` bytes and gives it to the back-end."""
        self.memory_size = size
        fd = self.own(os.memfd_create("perf-guest", os.MFD_CLOEXEC))
        os.ftruncate(fd, size)
        # Populated now: page faults during a window would look like the server's slowness.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.map = mmap.mmap(fd, size, flags=flags)
        self.set(
            lib.VHOST_USER_SET_MEM_TABLE,
            _struct("vhost_user_memory_header", 1, 0)
            + _struct("vhost_user_mem_region", 0, size, USER_ADDR, 0),
            [fd],
        )

    def place(self, size: int, align: int = PAGE) -> int:
        """The guest address of `size` bytes that nothing else uses."""
        start = -(-self._end // align) * align
        self._end = start + size
        return start

    def start_ring(self, index: int, size: int) -> Ring:
        """Makes a split ring and starts it as the back-end's queue `index`."""
        ring = Ring(
            size=size,
            desc=self.place(16 * size),
            avail=self.place(6 + 2 * size, 64),
            used=self.place(6 + 8 * size),
            kick_fd=self.own(os.eventfd(0, os.EFD_CLOEXEC)),
            call_fd=self.own(os.eventfd(0, os.EFD_CLOEXEC)),
        )
        state = "vhost_user_vring_state"
        user = [USER_ADDR + address for address in (ring.desc, ring.used, ring.avail)]
        self.set(lib.VHOST_USER_SET_VRING_NUM, _struct(state, index, size))
        self.set(lib.VHOST_USER_SET_VRING_BASE, _struct(state, index, 0))
        self.set(
            lib.VHOST_USER_SET_VRING_ADDR, _struct("vhost_user_vring_addr", index, 0, *user, 0)
        )
        number = index.to_bytes(8, "little")
        self.set(lib.VHOST_USER_SET_VRING_CALL, number, [ring.call_fd])
        self.set(lib.VHOST_USER_SET_VRING_KICK, number, [ring.kick_fd])
        if self.has(lib.VHOST_USER_F_PROTOCOL_FEATURES):
            self.set(lib.VHOST_USER_SET_VRING_ENABLE, _struct(state, index, 1))
        return ring

    # -- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the connection, which stops the queues, and everything it was given."""
        self._socket.close()
        if self.map is not None:
            self.map.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def check(error: int, doing: str, stall_ms: int) -> None:
    """Raises what a C driver's run came to: TimeoutError for a stall, OSError for anything else."""
    if error == -errno.ETIMEDOUT:
        raise TimeoutError(f"no answer for {stall_ms / 1000:g} s ({doing})")
    if error:
        raise OSError(-error, f"{os.strerror(-error)} ({doing})")


def _header(request: int, size: int, flags: int = 0) -> bytes:
    return _struct("vhost_user_header", request, lib.VHOST_USER_VERSION | flags, size)


def _struct(name: str, *fields: Any) -> bytes:
    return bytes(ffi.buffer(ffi.new(f"struct {name} *", fields)))


def percentile(latency: Sequence[int], fraction: float) -> float:
    """The latency in µs below which `fraction` of a histogram's counts stayed (bucket floor)."""
    rest = fraction * sum(latency)
    for bucket, count in enumerate(latency):
        rest -= count
        if rest <= 0 and count:
            return float(lib.vhost_histogram_floor(bucket)) / 1000
    return 0.0


def by_floor(latency: Sequence[int]) -> dict[int, int]:
    """A histogram of buckets as latency in ns (bucket floor) → count, without empty buckets."""
    return {int(lib.vhost_histogram_floor(b)): int(n) for b, n in enumerate(latency) if n}


def time_to_features(path: Path, deadline: float, ended: Callable[[], str | None]) -> float:
    """Connects to `path` as soon as someone listens there; when GET_FEATURES was answered.

    Returns a ``time.monotonic()``; raises TimeoutError at `deadline` (same clock), and
    ConnectionError as soon as `ended` says how the server ended.
    """
    while (left := deadline - time.monotonic()) > 0:
        if end := ended():
            raise ConnectionError(f"the server {end}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.settimeout(left)
                client.connect(str(path))
                client.sendall(_header(lib.VHOST_USER_GET_FEATURES, 0))
                if len(client.recv(HEADER_SIZE + 8, socket.MSG_WAITALL)) == HEADER_SIZE + 8:
                    return time.monotonic()
            except (FileNotFoundError, ConnectionError):
                pass
        # Not there yet, or it hung up: not ready, or about to end.
        time.sleep(0.0005)
    raise TimeoutError(f"nobody answered on {path}")
