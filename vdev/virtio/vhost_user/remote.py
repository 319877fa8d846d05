"""A device whose requests another process carries: a vhost-user back-end at a socket.

Theory of operation.  A transport sees a `Device` like any other; what it asks for goes to the
back-end over a `Link`.  The driver's choice of features and its resets come without waiting
(`Device.negotiate`, `Device.reset`): features are told with the first queue that starts.  When the
back-end is lost every queue is broken, and stopping one gives the index that its used ring says,
behind which nothing was completed.  A packed ring says none: then it is the one it began with.

Source: vhost-user specification, "Starting and stopping rings", "Back-end communication".
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import NotSupported, PeerError
from vdev.iothread import settle
from vdev.memory import GuestMemory
from vdev.virtio.device import Device
from vdev.virtio.queue import Queue, QueueConfig
from vdev.virtio.spec import RING_FEATURES
from vdev.virtio.vhost_user.channel import close_fds
from vdev.virtio.vhost_user.frontend import ANSWER_SECONDS, MAX_CONFIG, Frontend
from vdev.virtio.vhost_user.frontend_channel import FrontendChannel
from vdev.virtio.vhost_user.link import Again, Link, used_index

_F_CONFIG: int = lib.VHOST_USER_PROTOCOL_F_CONFIG
_F_BACKEND_REQ: int = lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ
_WANTED: int = (
    1 << lib.VHOST_USER_PROTOCOL_F_MQ
    | 1 << _F_CONFIG
    | 1 << _F_BACKEND_REQ
    | 1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << lib.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    | 1 << lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    | 1 << lib.VHOST_USER_PROTOCOL_F_STATUS
)
# Bits 0 to 23, and those from 50 on, are the device's own (virtio 1.3, section 2.2).
_FEATURES = RING_FEATURES | (1 << 24) - 1 | (1 << 64) - (1 << 50)
_MAX_QUEUES: int = lib.VHOST_USER_VRING_INDEX_MASK + 1
_BLK_QUEUES: int = ffi.offsetof("struct virtio_blk_config", "num_queues")

_MAC: int = 1 << lib.VIRTIO_NET_F_MAC
_TOLD_BY_SPACE: int = (
    1 << lib.VIRTIO_NET_F_MTU | 1 << lib.VIRTIO_NET_F_HASH_REPORT | 1 << lib.VIRTIO_NET_F_RSS
)
"""What a driver reads more of in the space, which only the back-end could fill in."""

_WRITES_MOST = 64
"""Writes to the configuration space that wait for a slow back-end: a guest can make any number."""


class VhostUserDevice(Device):
    """A device that the back-end at `path` serves; made by `connect`.

    lost: called with the reason when the back-end is gone for good; `fault` is that reason then.
    """

    def __init__(
        self, link: Link, path: str, device_id: int, num_queues: int, mac: bytes | None = None
    ) -> None:
        super().__init__()
        self.name = link.name
        self.path = path
        self.device_id = device_id
        self.num_queues = num_queues
        self.features = link.frontend.offered & _FEATURES | (0 if mac is None else _MAC)
        self._mac = mac
        self.lost = link.lost
        self._link = link
        self._channel: FrontendChannel | None = None
        self._accepted = 0
        self._space = b""
        self._space_size = 0
        self._changed = False
        self._closed = False
        self._written: dict[int, bytes] = {}  # by the driver, to the configuration space

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        device_id: int,
        num_queues: int | None = None,
        config: bytes | None = None,
        config_size: int | None = None,
        mac: bytes | None = None,
        name: str | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        patience: float = 0,
        sock: socket.socket | None = None,
        away_seconds: float = 0,
        dial: Callable[[str], socket.socket] | None = None,
    ) -> VhostUserDevice:
        """Connects to the back-end that listens on `path`, of a device of this virtio id.

        num_queues: None = as many as it says that it has.  config: the configuration space, where
        the back-end has none of its own.  config_size: of its own, in bytes, where the device is
        neither blk nor net.  mac: the address of a card, whatever the back-end says.
        answer_seconds, patience: see `Frontend`.  sock: is connected already, and becomes the
        device's.  away_seconds: how long a back-end that notes what is in flight, and has ended,
        may take to come back at `path`: requests wait meanwhile.  dial: gives a connection to what
        listens on `path` then, or raises OSError; None = connect(2).

        No thread of it is left running, so that a process may be confined before it is used.

        Raises PeerError where the back-end cannot serve such a device, OSError where it cannot be
        reached.
        """
        path = os.fspath(path)

        def opened() -> Frontend:
            if sock is not None:
                sock.settimeout(answer_seconds)
                frontend = Frontend(sock, answer_seconds=answer_seconds)
            else:
                frontend = Frontend.connect(path, answer_seconds=answer_seconds, patience=patience)
            try:
                frontend.negotiate_protocol(_WANTED)
            except BaseException:
                frontend.close()
                raise
            return frontend

        link = await Link.open(opened, name or f"vhost-user {path}")
        try:
            most = await link.call(link.frontend.queue_num)
            queues = _count_queues(num_queues, most, device_id)
            device = cls(link, path, device_id, queues, mac)
            if away_seconds and sock is None:
                reach = partial(_connect, dial, path, answer_seconds)
                link.again = Again(reach, queues, away_seconds)
                link.returned = device._returned
            await device._open(config, config_size)
            link.rest()
        except PeerError as error:
            link.close()
            raise type(error)(f"{path}: {error}") from None
        except BaseException:
            link.close()
            raise
        return device

    async def _open(self, config: bytes | None, config_size: int | None) -> None:
        link = self._link
        frontend = link.frontend
        if not self.features >> lib.VIRTIO_F_VERSION_1 & 1:
            raise PeerError("the back-end does not offer VIRTIO_F_VERSION_1")
        if frontend.has_protocol(_F_CONFIG):
            size = config_size or _space_size(self.device_id, self.features)
            self._space_size = min(size, MAX_CONFIG)
            if frontend.has_protocol(_F_BACKEND_REQ):
                sock = await link.call(frontend.open_channel)
                self._channel = FrontendChannel(sock, self._space_changed, link.warnings)
            try:
                await link.call(self._read_space)
            except BaseException:
                self._close_channel()
                raise
        elif config is not None:
            self._space = config
            if self.device_id == lib.VIRTIO_ID_NET:
                self.features &= ~_TOLD_BY_SPACE
        else:
            raise NotSupported("the back-end has no configuration space, and none was given")

    @property
    def fault(self) -> str | None:
        """Why the back-end is lost, or None."""
        return self._link.fault

    def config(self) -> bytes:
        return self._space

    def write_config(self, offset: int, data: bytes) -> None:
        """The back-end is told; what it makes of it shows in the space that is read afterwards."""
        if not self._space_size:
            super().write_config(offset, data)
        if self._link.asking >= _WRITES_MOST:
            raise PeerError(f"{self.name}: its back-end does not keep up with what is written")
        self._link.post(self._write_space, offset, data)

    def negotiate(self, features: int) -> None:
        super().negotiate(features)
        # What is ours the back-end need not know, and may not have offered.
        self._accepted = features & self._link.frontend.offered

    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> Queue:
        if config.index >= self.num_queues:
            raise PeerError(f"queue {config.index}, but the device has {self.num_queues}")
        queue = RemoteQueue(self._link, config, memory, on_broken)
        try:
            await queue.start(self._accepted)
        except asyncio.CancelledError:
            # The start is under way: only a stop behind it gives the ring back.
            await settle(asyncio.ensure_future(queue.stop()))
            raise
        except BaseException:
            queue.release()
            raise
        return queue

    def reset(self) -> None:
        self._accepted = 0
        if self.fault is None:
            self._link.post(self._reset)

    def describe(self) -> dict[str, Any]:
        return {"kind": "vhost-user", "back_end": self.path, "fault": self.fault}

    def close(self) -> None:
        self._closed = True
        self._close_channel()
        self._link.close()

    def _returned(self) -> None:
        """On the link's thread: another back-end knows nothing of what was said to the last one."""
        frontend, loop = self._link.frontend, self._link.loop
        if not self._space_size:
            return
        if frontend.has_protocol(_F_BACKEND_REQ):
            loop.call_soon_threadsafe(self._take_channel, frontend.open_channel())
        for offset, data in self._written.items():
            frontend.set_config(offset, data)
        before = self._space
        self._read_space()
        if self._space != before:
            loop.call_soon_threadsafe(self.notify_config)

    def _take_channel(self, sock: socket.socket) -> None:
        self._close_channel()
        if self._closed:
            sock.close()
        else:
            self._channel = FrontendChannel(sock, self._space_changed, self._link.warnings)

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _reset(self) -> None:
        self._written.clear()
        self._link.reset()

    def _read_space(self) -> None:
        space = bytearray(self._link.frontend.get_config(0, self._space_size))
        if self.device_id == lib.VIRTIO_ID_BLOCK:
            # The driver must find no more queues than the transport has.
            field = slice(_BLK_QUEUES, _BLK_QUEUES + 2)
            told = int.from_bytes(space[field], "little")
            space[field] = min(told, self.num_queues).to_bytes(2, "little")
        if self._mac is not None:
            space[: len(self._mac)] = self._mac
        self._space = bytes(space)

    def _write_space(self, offset: int, data: bytes) -> None:
        self._link.frontend.set_config(offset, data)
        self._written[offset] = data
        self._read_space()

    def _space_changed(self) -> None:
        """Said twice before it is read means no more than said once."""
        if self._changed or self.fault is not None:
            return
        self._changed = True

        def read() -> None:
            self._changed = False
            self._read_space()

        def done(future: asyncio.Future[None]) -> None:
            if not future.cancelled() and future.exception() is None:
                self.notify_config()

        self._link.post(read).add_done_callback(done)


class RemoteQueue(Queue):
    """A queue that the back-end of `link` serves.

    The back-end gets the kick and the call fd as they are.  Its error fd is one of ours, since
    both we and the transport want to hear of a broken ring.
    """

    def __init__(
        self,
        link: Link,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None,
    ) -> None:
        if config.log is not None:
            raise NotSupported(f"{link.name}: its back-end is not asked to log what it writes")
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._err = config.err_fd
        self._told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._config = replace(config, err_fd=self._told)
        self._memory = memory
        self._on_broken = on_broken
        self._stopping: asyncio.Task[int] | None = None
        self.fault = None
        link.lost.append(self._broke)
        self._loop.add_reader(self._told, self._broke, "its back-end says that it is broken")

    async def start(self, features: int) -> None:
        """Starts it; the driver accepted these features."""
        await self._link.call(self._link.start_ring, self._config, self._memory, features)

    async def stop(self) -> int:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        return await asyncio.shield(self._stopping)

    async def set_call(self, fd: int) -> None:
        await self._change(self._link.set_call, call_fd=fd)

    async def set_err(self, fd: int) -> None:
        self._err = fd

    async def set_kick(self, fd: int) -> None:
        await self._change(self._link.set_kick, kick_fd=fd)

    async def set_enabled(self, enabled: bool) -> None:
        await self._change(self._link.enable_ring, enabled=enabled)

    async def _change(self, tell: Callable[[QueueConfig], None], **changes: Any) -> None:
        config = replace(self._config, **changes)
        await self._link.call(tell, config)
        self._config = config

    async def set_memory(self, memory: GuestMemory) -> None:
        await self._link.call(self._link.move_ring, self._config, memory)
        self._memory = memory

    def release(self) -> None:
        """No more is heard of the ring."""
        if self._told >= 0:
            self._link.lost.remove(self._broke)
            self._loop.remove_reader(self._told)
            close_fds([self._told])
            self._told = -1

    async def _stop(self) -> int:
        try:
            return await self._link.call(self._link.stop_ring, self._config.index)
        except (OSError, PeerError):
            if self._link.frontend.failed is None:
                raise
            return used_index(self._config, self._memory)
        finally:
            self.release()

    def _broke(self, fault: str) -> None:
        """The first fault is told, once."""
        self._loop.remove_reader(self._told)
        if self.fault is None:
            self.fault = fault
            if self._err >= 0:
                os.eventfd_write(self._err, 1)
            if self._on_broken is not None:
                self._on_broken(fault)


def _connect(
    dial: Callable[[str], socket.socket] | None, path: str, seconds: float
) -> socket.socket:
    if dial is not None:
        sock = dial(path)
        sock.settimeout(seconds)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _count_queues(wanted: int | None, most: int | None, device_id: int) -> int:
    # Of a network card some back-ends count pairs.
    pairs = 2 if device_id == lib.VIRTIO_ID_NET else 1
    if wanted is None:
        wanted = min(most or pairs, _MAX_QUEUES)
    if not 1 <= wanted <= _MAX_QUEUES:
        raise PeerError(f"{wanted} queues: vhost-user has 1 to {_MAX_QUEUES}")
    if most is not None and wanted > most * pairs:
        raise PeerError(f"{wanted} queues, but the back-end has {most}")
    return wanted


def _space_size(device_id: int, features: int) -> int:
    """Back-ends refuse to tell more than their space has, which ends with what is offered."""
    if device_id == lib.VIRTIO_ID_NET:
        return int(ffi.sizeof("struct virtio_net_config"))
    if device_id != lib.VIRTIO_ID_BLOCK:
        raise NotSupported(
            f"the size of the configuration space of virtio device {device_id} has to be given"
        )
    end = "max_discard_sectors"
    if features >> lib.VIRTIO_BLK_F_DISCARD & 1:
        end = "max_write_zeroes_sectors"
    if features >> lib.VIRTIO_BLK_F_WRITE_ZEROES & 1:
        end = "max_secure_erase_sectors"
    return int(ffi.offsetof("struct virtio_blk_config", end))
