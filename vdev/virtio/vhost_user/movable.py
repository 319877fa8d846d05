"""A backend that moves to another process, while its front-end stays connected and knows nothing.

Theory of operation.  `halt` drains the rings and keeps all else, `save` writes down what the
front-end has said, `restore` builds it again from that text and the descriptors, and `go_on` serves
the rings from where they stopped: in the other process, or in the same one, if the move failed.
The text can be written while rings run: where they stopped (`halted`) is told apart.

What comes is ours, of the same version, and may still be damaged on the way: `restore` and
`go_on` raise ValueError, KeyError, TypeError or VdevError, and nothing has been touched then.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vdev.descriptors import Descriptors
from vdev.errors import PeerError, UserError
from vdev.memory import GuestMemory
from vdev.virtio.queue import BrokenQueue
from vdev.virtio.vhost_user.backend import Backend
from vdev.virtio.vhost_user.backend_channel import BackendChannel
from vdev.virtio.vhost_user.iotlb import Iotlb, Lack, Translation
from vdev.virtio.vhost_user.layout import Part, Placement
from vdev.virtio.vhost_user.mapped import map_inflight, map_log, map_region
from vdev.virtio.vhost_user.payloads import Inflight, Log, MemoryRegion, VringAddr
from vdev.virtio.vhost_user.ring import Ring
from vdev.virtio.vhost_user.rings import Gate
from vdev.virtio.vhost_user.session import F_OURS, Session


class MovableBackend(Backend):
    """See above."""

    def pause(self) -> None:
        """Tells the front-end nothing until `resume`."""
        if self._channel is not None:
            self._channel.pause()

    def resume(self) -> None:
        """Ends a pause; in the other process it begins with `restore`."""
        if self._channel is not None:
            self._channel.resume()

    async def halt(self) -> None:
        """Drains the rings; for the front-end they have not stopped.

        A ring that broke stays as it is.
        """
        halts = (self._halt_ring(index) for index in range(len(self.vrings)))
        for outcome in await asyncio.gather(*halts, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _halt_ring(self, index: int) -> None:
        vring = self.vrings[index]
        if (queue := vring.queue) is not None:
            await self._stop_ring(index)
            if queue.fault is not None:
                vring.queue = BrokenQueue(queue.fault, self.session.base(index))

    @property
    def to_start(self) -> list[Ring]:
        """The rings that the front-end has started and nobody serves, though they could be."""
        rings = zip(self.session.rings, self.vrings, strict=True)
        return [
            ring
            for ring, vring in rings
            if ring.started and vring.queue is None and not self._waits(ring)
        ]

    async def go_on(self, gate: Gate | None = None) -> None:
        """Serves the rings that the front-end has started; gate: see `QueueConfig`.

        Raises PeerError or OSError where one cannot be served.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for ring in self.to_start:
                    assert ring.placement is not None
                    kick = self.vrings[ring.index].kick
                    start = self._start_ring(ring.index, ring.placement, self._shown, kick, gate)
                    group.create_task(start)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        for ring in self.session.rings:
            for part, lack in self._waits(ring).items():
                self._ask(ring.index, part, lack)

    def _waits(self, ring: Ring) -> dict[int, Lack]:
        """For what a ring that the front-end has started waits."""
        iotlb = self.session.iotlb if self.session.translated else None
        return self._lacks_of(ring.placement, iotlb) if ring.placement is not None else {}

    @property
    def halted(self) -> list[dict[str, Any]]:
        """Where each ring stopped, and why it broke, after `halt`."""
        return [
            {"base": ring.base, "fault": vring.queue.fault if vring.queue else None}
            for ring, vring in zip(self.session.rings, self.vrings, strict=True)
        ]

    def set_halted(self, rings: list[dict[str, Any]]) -> None:
        """What `halted` gave."""
        for ring, vring, state in zip(self.session.rings, self.vrings, rings, strict=True):
            ring.base = _optional_int(state["base"])
            if (fault := state["fault"]) is not None:
                vring.queue = BrokenQueue(str(fault), self.session.base(ring.index))

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """All but where the rings stopped. Raises UserError where the device's state is just
        being transferred: its pipe ends with this process."""
        if self._transfer is not None:
            raise UserError(f"{self.device.name}: its state is on its way to or from a front-end")
        return {
            "session": _save_session(self.session),
            "device": self.device.save(),
            "memory": [fds.put(self._region_fds[region]) for region in self.session.regions],
            "log": fds.put(self._dirty_fd),
            "inflight": fds.put(self._inflight_fd),
            "channel": self._channel.save(fds) if self._channel is not None else None,
            "rings": [[fds.put(v.kick), fds.put(v.call), fds.put(v.err)] for v in self.vrings],
        }

    def restore(self, state: dict[str, Any], fds: Descriptors) -> None:
        """What `save` gave, into a backend that nobody has spoken to."""
        session = self.session
        _restore_session(session, state["session"])
        if session.features is not None:
            accepted = session.features & ~F_OURS
            if lacking := accepted & ~self.device.features:
                raise PeerError(f"features {lacking:#x} are in use, and not offered any more")
            self.device.negotiate(accepted)
        self.device.restore(state["device"])
        for region, place in zip(session.regions, state["memory"], strict=True):
            self._region_fds[region] = fds.take(place)
            self._regions[region] = map_region(region, self._region_fds[region])
        if session.regions:
            self._memory = GuestMemory(self._regions.values())
        self._dirty_fd = fds.take(state["log"])
        if session.log is not None:
            self._dirty = map_log(session.log, self._dirty_fd)
        self._inflight_fd = fds.take(state["inflight"])
        if (inflight := session.inflight) is not None:
            self._inflight = map_inflight(inflight, self._inflight_fd, packed=session.packed)
        if (channel := state["channel"]) is not None:
            self._channel = BackendChannel.restore(channel, fds, self._log)
        for vring, (kick, call, err) in zip(self.vrings, state["rings"], strict=True):
            vring.kick, vring.call, vring.err = fds.take(kick), fds.take(call), fds.take(err)


def _save_session(session: Session) -> dict[str, Any]:
    return {
        "offered": session.offered,
        "offered_protocol": session.offered_protocol,
        "owned": session.owned,
        "features": session.features,
        "protocol_features": session.protocol_features,
        "status": session.status,
        "regions": session.regions,
        "iotlb": session.iotlb.entries,
        "log": session.log,
        "inflight": session.inflight,
        "rings": [
            {
                "size": ring.size,
                "addresses": ring.addresses,
                "enabled": ring.enabled,
                "placement": ring.placement,
            }
            for ring in session.rings
        ],
    }


def _restore_session(session: Session, state: dict[str, Any]) -> None:
    """The front-end goes on with what it was offered, whatever we would offer now."""
    session.offered = int(state["offered"])
    session.offered_protocol = int(state["offered_protocol"])
    session.owned = bool(state["owned"])
    session.features = _optional_int(state["features"])
    session.protocol_features = _optional_int(state["protocol_features"])
    session.status = int(state["status"])
    session.regions = tuple(MemoryRegion(*region) for region in state["regions"])
    session.iotlb = Iotlb(tuple(Translation(*entry) for entry in state["iotlb"]))
    session.log = Log(*state["log"]) if state["log"] is not None else None
    session.inflight = Inflight(*state["inflight"]) if state["inflight"] is not None else None
    for ring, saved in zip(session.rings, state["rings"], strict=True):
        _restore_ring(ring, saved)


def _restore_ring(ring: Ring, state: dict[str, Any]) -> None:
    addresses, placement = state["addresses"], state["placement"]
    ring.size = int(state["size"])
    ring.addresses = VringAddr(*addresses) if addresses is not None else None
    ring.enabled = bool(state["enabled"])
    if placement is not None:
        ring.placement = Placement(*(Part(*part) for part in placement))


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
