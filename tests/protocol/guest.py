"""A guest for devices that other processes serve: shared memory, rings, and the driver's load."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
from typing import Any, Self

from vdev._native import ffi, lib
from vdev.memory import GuestMemory, Region
from vdev.virtio.queue import F_RING_PACKED, QueueConfig

PAGE = 4096
BASE = 0x10_0000  # where the memory begins
SIZE = 8 << 20
USER_BASE = 0x7B00_0000_0000
QUEUE_SIZE = 256
DEPTH = 32
BLOCK = 4096
RING_FEATURES: int = (
    1 << lib.VIRTIO_F_VERSION_1 | 1 << lib.VIRTIO_F_EVENT_IDX | 1 << lib.VIRTIO_F_INDIRECT_DESC
)


class Guest:
    """`SIZE` bytes from `BASE` on, in two regions of one file with a seam in the middle."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self.map = mmap.mmap(self.fd, SIZE)
        self.memory = GuestMemory([self.region(0, SIZE // 2), self.region(SIZE // 2, SIZE // 2)])
        self._end = SIZE // 4  # the seam lies among the buffers of the first queue
        self._fds: list[int] = []
        self._buffers: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.memory = GuestMemory(())
        gc.collect()  # tracebacks of errors that were expected hold regions too
        self.map.close()
        for fd in (self.fd, *self._fds):
            os.close(fd)

    def region(
        self, offset: int, size: int, *, guest_addr: int | None = None, shared: bool = True
    ) -> Region:
        """A region at `offset` of the file; its user addresses are unlike its guest addresses."""
        guest_addr = BASE + offset if guest_addr is None else guest_addr
        return Region.map(
            self.fd,
            guest_addr=guest_addr,
            size=size,
            user_addr=USER_BASE + 2 * (guest_addr - BASE),
            offset=offset,
            shared=shared,
        )

    def eventfd(self) -> int:
        self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._fds[-1]

    def queue(self, index: int, features: int = RING_FEATURES) -> QueueConfig:
        """A ring with room for the driver's load."""
        config = QueueConfig(
            index=index,
            size=QUEUE_SIZE,
            features=features,
            desc=self._place(16 * QUEUE_SIZE),
            avail=self._place(6 + 2 * QUEUE_SIZE),
            used=self._place(6 + 8 * QUEUE_SIZE),
            kick_fd=self.eventfd(),
            call_fd=self.eventfd(),
            err_fd=self.eventfd(),
        )
        self._buffers[index] = self._place(DEPTH * (PAGE + BLOCK))
        return config

    def write16(self, guest: int, value: int) -> None:
        self.map[guest - BASE : guest - BASE + 2] = value.to_bytes(2, "little")

    def clear(self, ring: QueueConfig) -> None:
        """An empty ring, as the next driver makes it."""
        parts = ((ring.desc, 16), (ring.avail, 2), (ring.used, 8))
        for guest, entry in parts:
            at, size = guest - BASE, entry * ring.size + 6
            self.map[at : at + size] = bytes(size)

    async def load(
        self,
        ring: QueueConfig,
        *,
        requests: int,
        start: int,
        span: int,
        write_percent: int = 50,
        stall_ms: int = 20000,
    ) -> Any:
        """What came of that many requests, random and verified: a `struct vhost_load_result`.

        Raises OSError.
        """
        os.set_blocking(ring.call_fd, True)
        with ffi.from_buffer(self.map) as memory:
            config = ffi.new(
                "struct vhost_load_config *",
                {
                    "memory": memory,
                    "memory_size": SIZE,
                    "guest_addr": BASE,
                    "desc": ring.desc,
                    "avail": ring.avail,
                    "used": ring.used,
                    "buffers": self._buffers[ring.index],
                    "start": start,
                    "span": span,
                    "requests": requests,
                    "seed": 1,
                    "flags": lib.VHOST_LOAD_RANDOM
                    | lib.VHOST_LOAD_VERIFY
                    | lib.VHOST_LOAD_EVENT_IDX
                    | lib.VHOST_LOAD_INDIRECT
                    | (lib.VHOST_LOAD_PACKED if ring.features & F_RING_PACKED else 0),
                    "queue_size": ring.size,
                    "depth": DEPTH,
                    "block_size": BLOCK,
                    "write_percent": write_percent,
                    "stall_ms": stall_ms,
                    "kick_fd": ring.kick_fd,
                    "call_fd": ring.call_fd,
                    "cpu": -1,
                },
            )
            result = ffi.new("struct vhost_load_result *")
            error = await asyncio.to_thread(lib.vhost_driver_run, config, result)
        if error:
            raise OSError(-error, os.strerror(-error))
        return result

    def _place(self, size: int) -> int:
        at = self._end
        self._end = -(-(at + size) // PAGE) * PAGE
        assert self._end <= SIZE
        return BASE + at
