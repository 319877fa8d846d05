"""The front-end of a vhost-user-blk back-end, as far as a measurement needs it.

It speaks just enough of the protocol to put one split ring into shared memory, then leaves the
ring to the C driver (``vhost_driver_run``).  It blocks: nothing else happens while it runs.
The wire structures are those of ``libvhost.h``.

Guest memory is one memfd, mapped at guest address 0 and at this "user address":
descriptors at 0, avail after them, used on a page of its own, then the driver's buffers.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vdev._native import ffi, lib

PAGE = 4096
USER_ADDR = 0x7F00_0000_0000
HEADER_SIZE = 12
RING_FEATURES = 1 << lib.VIRTIO_F_EVENT_IDX | 1 << lib.VIRTIO_F_INDIRECT_DESC
WANTED_FEATURES = (
    1 << lib.VIRTIO_F_VERSION_1
    | 1 << lib.VHOST_USER_F_PROTOCOL_FEATURES
    | 1 << lib.VIRTIO_BLK_F_FLUSH
)
WANTED_PROTOCOL_FEATURES = (
    1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIG
)


@dataclass(frozen=True)
class Load:
    """What the driver sends; sizes in bytes, times in seconds."""

    depth: int = 32
    block_size: int = 4096
    write_percent: int = 0
    random: bool = True
    poll: bool = True
    verify: bool = False
    seconds: float = 1.0
    requests: int = 0
    span: int = 0  # 0: the whole disk
    seed: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a load; times in seconds, latencies in nanoseconds."""

    requests: int
    bytes: int
    errors: int
    corrupt: int
    kicks: int
    sleeps: int
    seconds: float
    driver_cpu_seconds: float
    latency: tuple[int, ...]

    @property
    def iops(self) -> float:
        return self.requests / self.seconds

    def percentile(self, fraction: float) -> int:
        """The latency in ns below which `fraction` of the requests stayed (bucket floor)."""
        rest = fraction * sum(self.latency)
        for bucket, count in enumerate(self.latency):
            rest -= count
            if rest <= 0:
                return int(lib.vhost_histogram_floor(bucket))
        return 0


class Frontend:
    """One connection and one queue. A context manager; raises OSError where the peer refuses."""

    def __init__(
        self,
        path: str,
        *,
        queue_size: int = 128,
        features: int = RING_FEATURES,
        buffer_size: int = 8 << 20,
    ) -> None:
        """Connects to the back-end that listens on `path` and starts its queue 0."""
        self._queue_size = queue_size
        self._avail = 16 * queue_size
        self._used = -(-(self._avail + 6 + 2 * queue_size) // PAGE) * PAGE
        self._buffers = self._used + -(-(6 + 8 * queue_size) // PAGE) * PAGE
        self._size = self._buffers + buffer_size
        self._fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
            self._memory_fd = self._own(os.memfd_create("perf-guest", os.MFD_CLOEXEC))
            os.ftruncate(self._memory_fd, self._size)
            self._map = mmap.mmap(self._memory_fd, self._size)
            self._kick = self._own(os.eventfd(0))
            self._call = self._own(os.eventfd(0))
            self._negotiate(features)
            self._start_queue()
        except BaseException:
            self.close()
            raise

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    # -- messages ---------------------------------------------------------------------------

    def _send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        header = ffi.new(
            "struct vhost_user_header *", (request, lib.VHOST_USER_VERSION | flags, len(payload))
        )
        socket.send_fds(self._socket, [bytes(ffi.buffer(header)) + payload], fds)

    def _read(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionResetError(errno.ECONNRESET, "the back-end closed the connection")
        return data

    def _reply(self, request: int) -> bytes:
        header = ffi.new("struct vhost_user_header *")
        ffi.buffer(header)[:] = self._read(HEADER_SIZE)
        if header.request != request:
            raise OSError(errno.EPROTO, f"reply to {header.request}, not to {request}")
        return self._read(header.size) if header.size else b""

    def _get_u64(self, request: int) -> int:
        self._send(request)
        return int.from_bytes(self._reply(request), "little")

    def _set(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Sends a message and awaits its acknowledgement."""
        self._send(request, payload, fds, lib.VHOST_USER_NEED_REPLY)
        if int.from_bytes(self._reply(request), "little"):
            raise OSError(errno.EPROTO, f"the back-end refused request {request}")

    def _struct(self, name: str, *fields: Any) -> bytes:
        return bytes(ffi.buffer(ffi.new(f"struct {name} *", fields)))

    # -- set-up -----------------------------------------------------------------------------

    def _negotiate(self, features: int) -> None:
        self._send(lib.VHOST_USER_SET_OWNER)
        offered = self._get_u64(lib.VHOST_USER_GET_FEATURES)
        protocol = self._get_u64(lib.VHOST_USER_GET_PROTOCOL_FEATURES)
        missing = WANTED_PROTOCOL_FEATURES & ~protocol
        if missing:
            raise OSError(errno.EPROTO, f"the back-end lacks protocol features {missing:#x}")
        self._send(
            lib.VHOST_USER_SET_PROTOCOL_FEATURES, WANTED_PROTOCOL_FEATURES.to_bytes(8, "little")
        )
        self.features = offered & (WANTED_FEATURES | features)
        self._set(lib.VHOST_USER_SET_FEATURES, self.features.to_bytes(8, "little"))
        # Only the capacity: peers' config spaces differ in length, and refuse to be over-read.
        head = self._struct("vhost_user_config_header", 0, 8, 0)
        self._send(lib.VHOST_USER_GET_CONFIG, head + bytes(8))
        config = self._reply(lib.VHOST_USER_GET_CONFIG)
        self.capacity = int.from_bytes(config[len(head) : len(head) + 8], "little") * 512

    def _start_queue(self) -> None:
        self._set(
            lib.VHOST_USER_SET_MEM_TABLE,
            self._struct("vhost_user_memory_header", 1, 0)
            + self._struct("vhost_user_mem_region", 0, self._size, USER_ADDR, 0),
            [self._memory_fd],
        )
        state = "vhost_user_vring_state"
        self._set(lib.VHOST_USER_SET_VRING_NUM, self._struct(state, 0, self._queue_size))
        self._set(lib.VHOST_USER_SET_VRING_BASE, self._struct(state, 0, 0))
        self._set(
            lib.VHOST_USER_SET_VRING_ADDR,
            self._struct(
                "vhost_user_vring_addr",
                *(0, 0, USER_ADDR, USER_ADDR + self._used, USER_ADDR + self._avail, 0),
            ),
        )
        index = bytes(8)
        self._set(lib.VHOST_USER_SET_VRING_CALL, index, [self._call])
        self._set(lib.VHOST_USER_SET_VRING_KICK, index, [self._kick])
        self._set(lib.VHOST_USER_SET_VRING_ENABLE, self._struct(state, 0, 1))

    # -- use --------------------------------------------------------------------------------

    def run(self, load: Load, *, cpu: int = -1) -> Outcome:
        """Runs `load` in this thread, pinned to `cpu`.

        Raises TimeoutError when the back-end stops answering, OSError when it breaks the ring.
        """
        flags = (
            (lib.VHOST_LOAD_RANDOM if load.random else 0)
            | (lib.VHOST_LOAD_POLL if load.poll else 0)
            | (lib.VHOST_LOAD_VERIFY if load.verify else 0)
            | (lib.VHOST_LOAD_EVENT_IDX if self._has(lib.VIRTIO_F_EVENT_IDX) else 0)
            | (lib.VHOST_LOAD_INDIRECT if self._has(lib.VIRTIO_F_INDIRECT_DESC) else 0)
        )
        with ffi.from_buffer(self._map) as memory:
            config = ffi.new(
                "struct vhost_load_config *",
                {
                    "memory": memory,
                    "memory_size": self._size,
                    "avail": self._avail,
                    "used": self._used,
                    "buffers": self._buffers,
                    "span": load.span or self.capacity,
                    "requests": load.requests,
                    "duration_ns": 0 if load.requests else int(load.seconds * 1e9),
                    "seed": load.seed,
                    "flags": flags,
                    "queue_size": self._queue_size,
                    "depth": load.depth,
                    "block_size": load.block_size,
                    "write_percent": load.write_percent,
                    "stall_ms": 5000,
                    "kick_fd": self._kick,
                    "call_fd": self._call,
                    "cpu": cpu,
                },
            )
            result = ffi.new("struct vhost_load_result *")
            error = lib.vhost_driver_run(config, result)
        if error == -errno.ETIMEDOUT:
            raise TimeoutError(f"the back-end stalled after {result.requests} requests of {load}")
        if error:
            raise OSError(-error, f"{os.strerror(-error)} (running {load})")
        return Outcome(
            requests=result.requests,
            bytes=result.bytes,
            errors=result.errors,
            corrupt=result.corrupt,
            kicks=result.kicks,
            sleeps=result.sleeps,
            seconds=result.elapsed_ns / 1e9,
            driver_cpu_seconds=result.cpu_ns / 1e9,
            latency=tuple(result.latency),
        )

    def _has(self, feature: int) -> bool:
        return bool(self.features >> feature & 1)

    def close(self) -> None:
        """Closes the connection, which stops the queue, and everything it was given."""
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def time_to_features(path: str, deadline: float) -> float:
    """Connects to `path` as soon as someone listens there; when GET_FEATURES was answered.

    Returns a ``time.monotonic()``; raises TimeoutError at `deadline` (same clock).
    """
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.0005)
                continue
            header = ffi.new(
                "struct vhost_user_header *",
                (lib.VHOST_USER_GET_FEATURES, lib.VHOST_USER_VERSION, 0),
            )
            client.sendall(bytes(ffi.buffer(header)))
            if len(client.recv(HEADER_SIZE + 8, socket.MSG_WAITALL)) == HEADER_SIZE + 8:
                return time.monotonic()
    raise TimeoutError(f"nobody answered on {path}")
