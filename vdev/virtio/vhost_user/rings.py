"""Guest memory, and the queues that are served in it, started, stopped and moved together.

Without an IOMMU queues work in guest memory itself.  With one (VIRTIO_F_ACCESS_PLATFORM) they work
in a view of it, which the `Iotlb` of the session makes: each message that changes that gives them
the next view.

    what was said holds still (UPDATE)     each queue goes over to the next view and runs on
    something was taken back (INVALIDATE)  each drains first: no request uses what is gone
    a part of a ring is somewhere else     its queue stops, and starts once all is translated
    memory itself changes                  as if all had been taken back and said again

What is lacking is asked for: by a queue that met a chain with an address unknown to it, which then
waits (native/src/view.c), and for a ring that cannot start.  Each asks for one thing at a time, and
not again before the answer, or before something was taken back, which may have been the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from vdev.dirtylog import DirtyLog
from vdev.errors import PeerError
from vdev.inflight import InflightRegion
from vdev.memory import GuestMemory, MemoryView, Region
from vdev.ratelog import RateLimitedLog
from vdev.virtio.device import Device
from vdev.virtio.queue import BrokenQueue, Queue, QueueConfig
from vdev.virtio.vhost_user.backend_channel import BackendChannel
from vdev.virtio.vhost_user.channel import close_fds
from vdev.virtio.vhost_user.iotlb import Iotlb, Lack
from vdev.virtio.vhost_user.layout import Placement, log_used, place_ring
from vdev.virtio.vhost_user.payloads import MemoryRegion
from vdev.virtio.vhost_user.ring import Ring
from vdev.virtio.vhost_user.session import Session

Gate = Callable[[], Awaitable[None]]
_CHAINS = 3  # beside the three parts of a ring
_NATIVE = itemgetter(0, 1, 2, 3)  # of a translation


@dataclass(slots=True)
class Vring:
    """What a ring holds: its three eventfds (-1 = none), and the queue while it is served.

    lacks: what was asked for, for each part of the ring (0-2) and for its chains (3).
    """

    kick: int = -1
    call: int = -1
    err: int = -1
    queue: Queue | None = None
    lacks: dict[int, Lack] = field(default_factory=dict)


class Shown(NamedTuple):
    """What queues work in; iotlb: what it was made from, where it is a view."""

    memory: GuestMemory
    iotlb: Iotlb | None


class Rings:
    """Those of one connection."""

    def __init__(self, device: Device, session: Session, log: RateLimitedLog) -> None:
        self.device = device
        self.session = session
        self._log = log
        self._regions: dict[MemoryRegion, Region] = {}
        self._region_fds: dict[MemoryRegion, int] = {}
        self._memory: GuestMemory | None = None
        self._view: tuple[GuestMemory, Iotlb, MemoryView] | None = None  # the last one made
        self._dirty: DirtyLog | None = None
        self._inflight: InflightRegion | None = None
        self._channel: BackendChannel | None = None
        self.vrings = [Vring() for _ in range(device.num_queues)]

    # Guest memory

    def _hold(self, fds: dict[MemoryRegion, int]) -> None:
        """The files of the regions, for a process that takes over; others are closed."""
        close_fds(fd for region, fd in self._region_fds.items() if fds.get(region) != fd)
        self._region_fds = fds

    async def _set_memory(self, mapped: dict[MemoryRegion, Region]) -> None:
        """Moves all queues over to a new snapshot; the old one goes when none is left in it."""
        memory = GuestMemory(mapped.values())
        if self.session.translated:
            await self._show(memory, self.session.iotlb.moved(tuple(mapped)))
        else:
            await self._go_over(tuple(mapped), memory)
            self._view = None
        self._memory = memory
        self._regions = mapped

    async def _go_over(self, regions: Iterable[MemoryRegion], memory: GuestMemory) -> None:
        for ring, vring in zip(self.session.rings, self.vrings, strict=True):
            if vring.queue is None or ring.addresses is None:
                continue
            try:
                placement = place_ring(
                    regions, ring.addresses, ring.size, packed=self.session.packed
                )
            except PeerError:
                # The guest addresses may be there still, but they are not the ring's: breaking
                # it needs a memory that certainly lacks them.
                await vring.queue.set_memory(GuestMemory(()))
                continue
            if placement == ring.placement or vring.queue.fault:
                await vring.queue.set_memory(memory)
            else:
                # The same place for the front-end, another one for the guest.
                await self._stop_ring(ring.index)
                await self._start_ring(ring.index, placement, Shown(memory, None), vring.kick)

    # What an IOMMU shows of it

    @property
    def _shown(self) -> Shown:
        """What a queue that starts now works in."""
        assert self._memory is not None
        if not self.session.translated:
            return Shown(self._memory, None)
        return self._shown_by(self._memory, self.session.iotlb)

    def _shown_by(self, memory: GuestMemory, iotlb: Iotlb) -> Shown:
        if self._view is None or self._view[0] is not memory or self._view[1] is not iotlb:
            self._view = (memory, iotlb, MemoryView(memory, map(_NATIVE, iotlb.entries)))
        return Shown(self._view[2], iotlb)

    async def iotlb_msg(self, body: Iotlb, _fds: list[int]) -> None:
        assert self._memory is not None
        await self._show(self._memory, body)

    async def _show(self, memory: GuestMemory, iotlb: Iotlb) -> None:
        """Has all queues work in what `iotlb` shows of `memory`; none works in anything else then.

        A queue whose ring is not there any more has stopped, and waits for it.
        """
        shown = self._shown_by(memory, iotlb)
        extends = iotlb.extends and memory is self._memory
        for vring in self.vrings:
            vring.lacks = {
                part: lack for part, lack in vring.lacks.items() if extends and iotlb.lacks(lack)
            }
        try:
            async with asyncio.TaskGroup() as group:
                for ring in self.session.rings:
                    if ring.placement is not None:
                        move = self._move_ring(ring, ring.placement, shown, extends=extends)
                        group.create_task(move)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _move_ring(
        self, ring: Ring, placement: Placement, shown: Shown, *, extends: bool
    ) -> None:
        vring, packed = self.vrings[ring.index], self.session.packed
        assert shown.iotlb is not None
        if (queue := vring.queue) is not None:
            before = self.session.iotlb.lies(placement, packed=packed)
            if queue.fault is None and shown.iotlb.lies(placement, packed=packed) != before:
                await self._stop_ring(ring.index)
            elif extends:
                await queue.extend_memory(shown.memory)
            else:
                await queue.set_memory(shown.memory)
        if vring.queue is None:
            try:
                await self._start_ring(ring.index, placement, shown, vring.kick)
            except (PeerError, OSError) as error:
                # The message that brought its translation is right all the same.
                self._log.warning("%s: queue %d: %s", self.device.name, ring.index, error)
                vring.queue = BrokenQueue(str(error), self.session.base(ring.index))

    def _lacks_of(self, placement: Placement, iotlb: Iotlb | None) -> dict[int, Lack]:
        """What keeps a ring from being served, by its parts."""
        return {} if iotlb is None else iotlb.lacks_of(placement, packed=self.session.packed)

    def _ask(self, index: int, part: int, lack: Lack) -> None:
        """Tells the front-end that a translation is lacking."""
        if self.vrings[index].lacks.get(part) != lack:
            self.vrings[index].lacks[part] = lack
            if self._channel is not None:
                self._channel.miss((index, part), lack.iova, lack.access)

    def _ask_again(self) -> None:
        """On a channel that is new."""
        for index, vring in enumerate(self.vrings):
            lacks, vring.lacks = vring.lacks, {}
            for part, lack in lacks.items():
                self._ask(index, part, lack)

    # Queues

    async def _start_ring(
        self,
        index: int,
        placement: Placement,
        shown: Shown,
        kick: int,
        gate: Gate | None = None,
    ) -> None:
        """Has a ring served, or asks for what is lacking."""
        ring, vring = self.session.rings[index], self.vrings[index]
        assert ring.addresses is not None
        if lacks := self._lacks_of(placement, shown.iotlb):
            for part, lack in lacks.items():
                self._ask(index, part, lack)
            return

        def broken(fault: str) -> None:
            self._log.warning(
                "%s: queue %d broke by its guest's fault: %s", self.device.name, index, fault
            )

        def missed(iova: int, access: int) -> None:
            self._ask(index, _CHAINS, Lack(iova, access))

        config = QueueConfig(
            index=index,
            size=ring.size,
            features=self.session.features or 0,
            desc=placement.desc.start,
            avail=placement.avail.start,
            used=placement.used.start,
            next_index=self.session.base(index),
            enabled=ring.enabled,
            kick_fd=kick,
            call_fd=vring.call,
            err_fd=vring.err,
            log=self._dirty if self.session.logging else None,
            log_used=log_used(ring.addresses),
            inflight=self._inflight,
            gate=gate,
            on_miss=missed,
        )
        vring.queue = await self.device.start_queue(config, shown.memory, broken)

    async def _stop_ring(self, index: int, *, suspend: bool = False) -> None:
        vring = self.vrings[index]
        if (queue := vring.queue) is not None:
            base = await (queue.suspend() if suspend else queue.stop())
            self.session.rings[index].base = base
            vring.queue = None
        vring.lacks.clear()

    async def _stop_rings(self) -> None:
        """All at once: each drains its own requests."""
        stops = (self._stop_ring(index) for index in range(len(self.vrings)))
        for outcome in await asyncio.gather(*stops, return_exceptions=True):
            if outcome is not None:
                raise outcome
