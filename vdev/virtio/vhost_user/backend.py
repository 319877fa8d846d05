"""The effects of messages: on guest memory, queues and the device.

One method a row of the table that has an effect or a reply, named by its `handler`.  A method
takes the checked body and the message's descriptors; it returns the value of the reply.  It does
its effect or raises, and leaves things as they were if it raises; the state moves afterwards
(`Session.commit`).  A descriptor that is kept is taken out of the list; the rest are closed.  Those
that go along with the reply (`Row.reply_fds`) are put into it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from vdev._native import lib
from vdev.dirtylog import DirtyLog
from vdev.errors import PeerError
from vdev.inflight import new_inflight_file
from vdev.iothread import settle
from vdev.ratelog import RateLimitedLog
from vdev.virtio.device import Device
from vdev.virtio.spec import describe_features, feature_names, protocol_feature_names, status_names
from vdev.virtio.vhost_user import offer
from vdev.virtio.vhost_user.backend_channel import BackendChannel
from vdev.virtio.vhost_user.channel import close_fds
from vdev.virtio.vhost_user.codec import Message
from vdev.virtio.vhost_user.kept import check_eventfd, eventfd, keep
from vdev.virtio.vhost_user.layout import log_used
from vdev.virtio.vhost_user.mapped import map_inflight, map_log, map_region
from vdev.virtio.vhost_user.payloads import (
    ConfigAccess,
    Inflight,
    Log,
    MemoryRegion,
    TransferState,
    VringAddr,
    VringState,
)
from vdev.virtio.vhost_user.ring import VringFd
from vdev.virtio.vhost_user.rings import Rings
from vdev.virtio.vhost_user.session import (
    F_LOG_ALL,
    F_OURS,
    F_PROTOCOL,
    MEM_SLOTS,
    Request,
    Session,
)
from vdev.virtio.vhost_user.state import decode_state, encode_state
from vdev.virtio.vhost_user.transfer import Transfer, receive, send

_F_BASE_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT


class Backend(Rings):
    """One connection's hold on a device; `close` gives everything back."""

    def __init__(self, device: Device, log: RateLimitedLog) -> None:
        session = Session(
            features=offer.virtio_features(device),
            protocol_features=offer.protocol_features(device),
            num_queues=device.num_queues,
            config_size=len(device.config()),
        )
        super().__init__(device, session, log)
        self._dirty_fd = -1
        self._inflight_fd = -1
        self._transfer: Transfer | None = None
        device.config_changed.append(self._config_changed)

    async def handle(self, message: Message) -> tuple[Request, Any]:
        """Checks a message and carries it out; returns the request and the value of its reply.

        Raises PeerError or OSError where it was refused or failed: nothing has changed then.
        """
        request = self.session.check(message)
        reply = None
        if handler := getattr(self, request.row.handler, None):
            reply = await handler(request.body, message.fds)
        self.session.commit(request)
        return request, reply

    async def close(self) -> None:
        """Stops and drains all queues, releases memory and descriptors, resets the device.

        Cancelled or not, all is done when this ends: the device may be freed next.
        """
        await settle(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        self.device.config_changed.remove(self._config_changed)
        if self._channel is not None:
            self._channel.close()
        try:
            await self._end_transfer()
            await self._stop_rings()
        finally:
            for vring in self.vrings:
                close_fds(fd for fd in (vring.kick, vring.call, vring.err) if fd >= 0)
                vring.kick = vring.call = vring.err = -1
            self._memory = self._view = self._dirty = self._inflight = None
            self._dirty_fd = keep(self._dirty_fd, [])
            self._inflight_fd = keep(self._inflight_fd, [])
            self._regions.clear()
            self._hold({})
            self.device.release()

    def status(self) -> dict[str, Any]:
        """What was agreed, and the rings."""
        session = self.session
        names = feature_names(self.device.device_id)
        return {
            "features": describe_features(session.features or 0, names),
            "protocol_features": describe_features(
                session.protocol_features or 0, protocol_feature_names()
            ),
            "device_status": [n for value, n in status_names().items() if session.status & value],
            "memory": {
                "regions": len(session.regions),
                "bytes": sum(region.size for region in session.regions),
            },
            "queues": [
                {
                    "index": ring.index,
                    "size": ring.size,
                    "started": vring.queue is not None,
                    "enabled": ring.enabled,
                    "broken": vring.queue.fault if vring.queue else None,
                }
                for ring, vring in zip(session.rings, self.vrings, strict=True)
            ],
        }

    # Negotiation

    async def get_features(self, _body: None, _fds: list[int]) -> int:
        return self.session.offered

    async def set_features(self, body: int, _fds: list[int]) -> None:
        session = self.session
        if session.features is None or (body ^ session.features) & ~F_LOG_ALL:
            self.device.negotiate(body & ~F_OURS)
        await self._set_log(self._dirty if body & F_LOG_ALL else None)
        if not body & F_PROTOCOL:
            for ring in session.rings:
                await self._enable(ring.index, True)

    async def get_protocol_features(self, _body: None, _fds: list[int]) -> int:
        return self.session.offered_protocol

    async def get_queue_num(self, _body: None, _fds: list[int]) -> int:
        # Virtqueues.  Some back-ends count pairs for net; cloud-hypervisor compares with queues,
        # and QEMU's pairs are never more than those.
        return self.device.num_queues

    async def reset_owner(self, _body: None, _fds: list[int]) -> None:
        for ring in self.session.rings:
            await self._enable(ring.index, False)

    async def reset_device(self, _body: None, _fds: list[int]) -> None:
        await self._end_transfer()
        await self._stop_rings()
        self._inflight = None
        self._inflight_fd = keep(self._inflight_fd, [])
        self.device.reset()

    async def get_status(self, _body: None, _fds: list[int]) -> int:
        return self.session.status

    async def set_status(self, body: int, fds: list[int]) -> None:
        if body == 0:
            await self.reset_device(None, fds)

    # Guest memory

    async def get_max_mem_slots(self, _body: None, _fds: list[int]) -> int:
        return MEM_SLOTS

    async def set_mem_table(self, body: tuple[MemoryRegion, ...], fds: list[int]) -> None:
        mapped = {region: map_region(region, fd) for region, fd in zip(body, fds, strict=True)}
        await self._set_memory(mapped)
        self._hold(dict(zip(body, fds, strict=True)))
        fds.clear()

    async def add_mem_reg(self, body: MemoryRegion, fds: list[int]) -> None:
        await self._set_memory({**self._regions, body: map_region(body, fds[0])})
        self._hold({**self._region_fds, body: fds.pop()})

    async def rem_mem_reg(self, body: MemoryRegion, _fds: list[int]) -> None:
        await self._set_memory({r: m for r, m in self._regions.items() if r is not body})
        self._hold({region: fd for region, fd in self._region_fds.items() if region is not body})

    # The dirty log

    async def set_log_base(self, body: Log, fds: list[int]) -> int:
        """The front-end reads the log that was used before once more after the reply."""
        dirty = map_log(body, fds[0])
        if (self.session.features or 0) & F_LOG_ALL:
            await self._set_log(dirty)
        self._dirty = dirty
        self._dirty_fd = keep(self._dirty_fd, fds)
        return 0

    async def set_log_fd(self, _body: None, fds: list[int]) -> None:
        check_eventfd(fds[0], "the log's")

    async def set_vring_addr(self, body: VringAddr, _fds: list[int]) -> None:
        queue = self.vrings[body.ring].queue
        if queue is not None and self.session.logging:
            await queue.set_log(self._dirty, log_used(body))

    async def _set_log(self, dirty: DirtyLog | None) -> None:
        """Has all queues log there: they go on running."""
        for ring, vring in zip(self.session.rings, self.vrings, strict=True):
            if vring.queue is not None and ring.addresses is not None:
                await vring.queue.set_log(dirty, log_used(ring.addresses))

    # In-flight tracking

    async def get_inflight_fd(self, body: Inflight, fds: list[int]) -> Inflight:
        fd, size = new_inflight_file(body.num_queues, body.queue_size, packed=self.session.packed)
        fds.append(fd)
        return Inflight(size, 0, body.num_queues, body.queue_size)

    async def set_inflight_fd(self, body: Inflight, fds: list[int]) -> None:
        self._inflight = map_inflight(body, fds[0], packed=self.session.packed)
        self._inflight_fd = keep(self._inflight_fd, fds)

    # Rings

    async def set_vring_kick(self, body: VringFd, fds: list[int]) -> None:
        vring = self.vrings[body.ring]
        kick = eventfd(body, fds)
        if vring.queue is not None:
            await vring.queue.set_kick(kick)
        else:
            placement = self.session.place(body.ring)
            await self._end_transfer()
            await self._start_ring(body.ring, placement, self._shown, kick)
        vring.kick = keep(vring.kick, fds)

    async def set_vring_call(self, body: VringFd, fds: list[int]) -> None:
        vring = self.vrings[body.ring]
        call = eventfd(body, fds)
        if vring.queue is not None:
            await vring.queue.set_call(call)
        vring.call = keep(vring.call, fds)

    async def set_vring_err(self, body: VringFd, fds: list[int]) -> None:
        vring = self.vrings[body.ring]
        err = eventfd(body, fds)
        if vring.queue is not None:
            await vring.queue.set_err(err)
        vring.err = keep(vring.err, fds)

    async def get_vring_base(self, body: VringState, _fds: list[int]) -> VringState:
        """The ring stops before the answer; the kick fd is given back.

        It drains, unless the front-end takes what is in flight elsewhere.
        """
        await self._stop_ring(body.ring, suspend=self.session.has_protocol(_F_BASE_INFLIGHT))
        vring = self.vrings[body.ring]
        vring.kick = keep(vring.kick, [])
        return VringState(body.ring, self.session.base(body.ring))

    async def set_vring_enable(self, body: VringState, _fds: list[int]) -> None:
        await self._enable(body.ring, bool(body.num))

    async def _enable(self, index: int, enabled: bool) -> None:
        if self.session.rings[index].enabled == enabled:
            return
        if enabled:
            self.device.queue_enabled(index, True)
        if (queue := self.vrings[index].queue) is not None:
            await queue.set_enabled(enabled)
        if not enabled:
            self.device.queue_enabled(index, False)

    # The device

    async def get_config(self, body: ConfigAccess, _fds: list[int]) -> ConfigAccess:
        data = self.device.config()[body.offset : body.offset + body.size]
        return body._replace(data=data)

    async def set_config(self, body: ConfigAccess, _fds: list[int]) -> None:
        self.device.write_config(body.offset, body.data)

    async def net_set_mtu(self, body: int, _fds: list[int]) -> None:
        self.device.set_mtu(body)

    async def send_rarp(self, body: int, _fds: list[int]) -> None:
        # The first six bytes in memory order, as the front-end copied them.
        self.device.announce(body.to_bytes(8, sys.byteorder)[:6])

    # The device's state, which is told while no ring runs: one that starts ends a transfer

    async def set_device_state_fd(self, body: TransferState, fds: list[int]) -> int:
        await self._end_transfer()
        save = body.direction == lib.VHOST_USER_TRANSFER_SAVE
        self._transfer = Transfer.start(fds[0], self._save if save else self._load)
        fds.clear()
        return int(lib.VHOST_USER_TRANSFER_NOFD)

    async def check_device_state(self, _body: None, _fds: list[int]) -> int:
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise PeerError("no transfer of the device's state was begun")
        await transfer.outcome()
        return 0

    async def _save(self, fd: int) -> None:
        await send(fd, encode_state(self.device))

    async def _load(self, fd: int) -> None:
        decode_state(self.device, await receive(fd))

    async def _end_transfer(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            await transfer.cancel()

    async def set_backend_req_fd(self, _body: None, fds: list[int]) -> None:
        channel = BackendChannel(fds[0], self._log)
        fds.clear()
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        self._ask_again()

    def _config_changed(self) -> None:
        if self._channel is not None:
            self._channel.config_changed()
