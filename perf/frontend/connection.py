"""A front-end with guest memory and rings of its own, for the C drivers to work on.

It blocks: nothing else happens while it runs.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from perf.model import Unsupported
from vdev._native import lib
from vdev.closing import Closing
from vdev.virtio.queue import QueueConfig, first_index
from vdev.virtio.vhost_user.frontend import Frontend, SharedRegion

PAGE = 4096
USER_ADDR = 0x7F00_0000_0000
RING_EVENT_IDX = 1 << lib.VIRTIO_F_EVENT_IDX
RING_FEATURES = RING_EVENT_IDX | 1 << lib.VIRTIO_F_INDIRECT_DESC
RING_PACKED = 1 << lib.VIRTIO_F_RING_PACKED
RING_IN_ORDER = 1 << lib.VIRTIO_F_IN_ORDER
_DEMANDED = {RING_PACKED: "packed rings", RING_IN_ORDER: "use in order"}
LEAVE_SECONDS = 2.0


class Connection(Closing):
    """A negotiated connection. A context manager; errors are those of `Frontend`.

    Guest memory is one memfd, mapped at guest address 0 and at ``USER_ADDR`` of "user" addresses.
    """

    def __init__(self, path: Path) -> None:
        """Connects to the back-end that listens on `path`."""
        self._fds: list[int] = []
        self._end = 0
        self.map: mmap.mmap | None = None
        self.memory_size = 0
        self.log_fd = -1
        self.frontend = Frontend.connect(path, patience=LEAVE_SECONDS)

    def own(self, fd: int) -> int:
        """Closes `fd` with the connection."""
        self._fds.append(fd)
        return fd

    def negotiate(self, wanted: int, protocol: int) -> None:
        """Takes what the back-end offers of `wanted` features and of `protocol` features.

        Raises OSError when it lacks VIRTIO_F_VERSION_1, which the drivers rely on.
        """
        needed = 1 << lib.VIRTIO_F_VERSION_1
        if not self.frontend.offered & needed:
            raise OSError(errno.EPROTO, "the back-end does not offer VIRTIO_F_VERSION_1")
        self.frontend.negotiate_protocol(protocol)
        self.frontend.set_features(self.frontend.offered & (wanted | needed))

    def require(self, features: int, server: str) -> None:
        """Raises Unsupported where RING_PACKED or RING_IN_ORDER, of `features`, was not got."""
        for feature, what in _DEMANDED.items():
            if features & ~self.frontend.features & feature:
                raise Unsupported(f"{server} does not offer {what}")

    def has(self, feature: int) -> bool:
        """Whether a feature bit was negotiated."""
        return self.frontend.has(feature)

    def share(self, size: int) -> None:
        """Makes guest memory of `size` bytes and gives it to the back-end."""
        self.memory_size = size
        fd = self.own(os.memfd_create("perf-guest", os.MFD_CLOEXEC))
        os.ftruncate(fd, size)
        # Populated now: page faults during a window would look like the server's slowness.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.map = mmap.mmap(fd, size, flags=flags)
        self.frontend.set_memory([SharedRegion(0, size, USER_ADDR, 0, fd)])

    def log(self) -> None:
        """Gives the back-end a log of guest memory, the file `log_fd`."""
        size = -(-self.memory_size // (8 * lib.VHOST_LOG_PAGE))
        self.log_fd = self.own(os.memfd_create("perf-log", os.MFD_CLOEXEC))
        os.ftruncate(self.log_fd, size)
        self.frontend.set_log(size, self.log_fd)

    def place(self, size: int, align: int = PAGE) -> int:
        """The guest address of `size` bytes that nothing else uses."""
        start = -(-self._end // align) * align
        self._end = start + size
        return start

    def start_ring(self, index: int, size: int) -> QueueConfig:
        """Makes a ring of the layout that was negotiated, and starts it as queue `index`."""
        features = self.frontend.features
        ring = QueueConfig(
            index=index,
            size=size,
            features=features,
            desc=self.place(16 * size),
            avail=self.place(6 + 2 * size, 64),
            used=self.place(6 + 8 * size),
            next_index=first_index(features),
            kick_fd=self.own(os.eventfd(0, os.EFD_CLOEXEC)),
            call_fd=self.own(os.eventfd(0, os.EFD_CLOEXEC)),
        )
        self.frontend.start_ring(ring)
        return ring

    def close(self) -> None:
        """Closes the connection, which stops the queues, and everything it was given."""
        self.frontend.close()
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
        with contextlib.suppress(FileNotFoundError, ConnectionError):
            Frontend.connect(path, answer_seconds=left).close()
            return time.monotonic()
        # Not there yet, or it hung up: not ready, or about to end.
        time.sleep(0.0005)
    raise TimeoutError(f"nobody answered on {path}")
