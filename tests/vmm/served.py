"""A device whose queues are served here, and its driver's side: rings in memory, no transport."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Self

from tests.frontend.memory import GuestMemory
from tests.frontend.packed import PackedRing
from tests.frontend.ring import Desc, Ring, SplitRing, Used
from vdev._native import lib
from vdev.iothread import IOThread
from vdev.memory import GuestMemory as MappedMemory
from vdev.memory import Region as MappedRegion
from vdev.virtio.batch import BatchDevice
from vdev.virtio.queue import F_RING_PACKED, QueueConfig, ServedQueue, first_index
from vdev.virtio.spec import RING_FEATURES

SIZE = 32


class Served:
    """Serves each queue of `device` in guest memory of two regions; closes the device too.

    features: what the driver negotiates.  sizes: entries of each ring.  packed: what rings are.
    """

    def __init__(
        self,
        device: BatchDevice,
        *,
        features: int | None = None,
        size: int = SIZE,
        start: bool = True,
        packed: bool = False,
    ) -> None:
        self.device = device
        self.features = device.features if features is None else features
        self.memory = GuestMemory.default()
        # A driver of packed rings that accepts IN_ORDER has to understand batches.
        self._ring_features = RING_FEATURES & ~(
            1 << lib.VIRTIO_F_EVENT_IDX | 1 << lib.VIRTIO_F_IN_ORDER
        )
        if not packed:
            self._ring_features &= ~F_RING_PACKED
        layout = PackedRing if packed else SplitRing
        self.rings: list[Ring] = [layout(self.memory, size) for _ in range(device.num_queues)]
        self.mapped = MappedMemory(
            MappedRegion.map(
                r.fd,
                guest_addr=r.guest_addr,
                size=r.size,
                user_addr=r.user_addr,
                offset=r.offset,
            )
            for r in self.memory.regions
        )
        (self.iothread,) = device.iothreads
        self.queues: dict[int, ServedQueue] = {}
        self.faults: asyncio.Queue[str] = asyncio.Queue()
        self._start = start
        self._next = [first_index(self._ring_features)] * device.num_queues

    async def __aenter__(self) -> Self:
        self.iothread.start()
        self.device.negotiate(self.features)
        if self._start:
            await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        await self.iothread.close()
        self.device.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()

    async def start(self, *indexes: int) -> None:
        for index in indexes or range(self.device.num_queues):
            ring = self.rings[index]
            config = QueueConfig(
                index=index,
                size=ring.size,
                features=self._ring_features,
                desc=ring.desc,
                avail=ring.avail,
                used=ring.used,
                next_index=self._next[index],
                kick_fd=ring.kick_fd,
                call_fd=ring.call_fd,
                err_fd=ring.err_fd,
            )
            self.queues[index] = await ServedQueue.start(
                config, self.device, self.mapped, self.iothread, self.faults.put_nowait
            )

    async def stop(self, *indexes: int) -> list[int]:
        """Stops queues, at once; returns their next indexes."""
        stopping = [self.queues.pop(i) for i in indexes or sorted(self.queues)]
        found = await asyncio.gather(*(queue.stop() for queue in stopping))
        for index, next_index in zip(indexes or range(len(found)), found, strict=False):
            self._next[index] = next_index
        return list(found)

    def reset_rings(self) -> None:
        """As a driver that starts anew; no queue runs."""
        for ring in self.rings:
            ring.reset()
        self._next = [first_index(self._ring_features)] * len(self._next)

    def data(self, data: bytes) -> Desc:
        """A buffer that the device may read."""
        address = self.memory.alloc(len(data), 8)
        self.memory.write(address, data)
        return Desc(address, len(data))

    def room(self, size: int) -> Desc:
        """A buffer that the device may write."""
        return Desc(self.memory.alloc(size, 8), size, write=True)

    def submit(self, queue: int, *chain: Desc, indirect: bool = False) -> int:
        return self.rings[queue].submit(chain, indirect=indirect)

    async def used(self, queue: int) -> Used:
        """The next used element, when it has come."""
        ring = self.rings[queue]
        while (element := ring.pop()) is None:
            await readable(ring.call_fd)
            os.eventfd_read(ring.call_fd)
        return element

    async def request(self, queue: int, *chain: Desc) -> int:
        """Submits a chain and waits for it; returns the length that was written."""
        head = self.submit(queue, *chain)
        element = await self.used(queue)
        assert element.id == head
        return element.len

    def content(self, *chain: Desc, size: int | None = None) -> bytes:
        """What lies in the buffers now; the first `size` bytes of it."""
        return b"".join(self.memory.read(d.addr, d.len) for d in chain)[:size]

    def release(self, chain: Sequence[Desc]) -> None:
        for desc in chain:
            self.memory.release(desc.addr, desc.len)


def threads() -> list[IOThread]:
    """The iothread of a device to be served; `Served` starts it."""
    return [IOThread(poll_us=0, io_uring=False)]


async def readable(fd: int) -> None:
    """Waits until `fd` is readable."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
