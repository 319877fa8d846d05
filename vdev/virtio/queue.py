"""The served queue: what a transport asks for, and the owned queue it gets.

configuration → `ServedQueue.start` → a queue that only its iothread touches → `stop` hands it back
as the index to go on from.  vhost-user gets the two fds from its front-end; other transports make
them themselves; nothing here can tell.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.iothread import IOThread, new_token, settle
from vdev.memory import GuestMemory
from vdev.virtio.device import Device

_START_ERRORS = {
    errno.EINVAL: "its size or the alignment of its parts is wrong (virtio 1.3, section 2.7)",
    errno.EFAULT: "a part of it lies outside guest memory",
    errno.ERANGE: "the device has no queue of that index",
}


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Everything a queue needs besides memory and device.

    desc, avail, used: guest physical addresses.  next_index: of the avail ring.  fds: eventfds,
    or -1; they stay the caller's.
    """

    index: int
    size: int
    features: int
    desc: int
    avail: int
    used: int
    next_index: int = 0
    enabled: bool = True
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1


class ServedQueue:
    """A queue that runs on an iothread, from `start` to `stop`."""

    def __init__(self, native: Any, token: int, iothread: IOThread, device: Device) -> None:
        self._native = native
        self._token = token
        self._device = device  # the native queue works in it
        self._stopping: asyncio.Task[int] | None = None
        self.iothread = iothread
        self.fault: str | None = None

    @classmethod
    async def start(
        cls,
        config: QueueConfig,
        device: Device,
        memory: GuestMemory,
        iothread: IOThread,
        on_broken: Callable[[str], None] | None = None,
    ) -> ServedQueue:
        """Starts to serve the ring; `on_broken(fault)` tells of a ring that its guest broke.

        Raises PeerError where the configuration is wrong, OSError where the host fails.
        """
        token = new_token()
        native_config = ffi.new(
            "struct vhost_queue_config *",
            {
                "token": token,
                "features": config.features,
                "desc": config.desc,
                "avail": config.avail,
                "used": config.used,
                "index": config.index,
                "size": config.size,
                "next_index": config.next_index,
                "enabled": config.enabled,
                "kick_fd": config.kick_fd,
                "call_fd": config.call_fd,
                "err_fd": config.err_fd,
            },
        )
        out = ffi.new("struct vhost_queue **")
        result = lib.vhost_queue_new(native_config, device.native, memory.native, out)
        if result < 0:
            reason = _START_ERRORS.get(-result)
            if reason is None:
                raise OSError(-result, os.strerror(-result), f"queue {config.index}")
            raise PeerError(f"queue {config.index} of {config.size} entries: {reason}")
        queue = cls(out[0], token, iothread, device)

        def broken(fault: str) -> None:
            queue.fault = fault
            if on_broken is not None:
                on_broken(fault)

        iothread.on_broken(token, broken)
        iothread.queues += 1
        try:
            await iothread.call(lib.vhost_queue_start, queue._native, iothread.native)
        except OSError:
            queue._release()
            raise
        except asyncio.CancelledError:
            # The start is under way: only a stop behind it gives the ring back.
            await settle(asyncio.ensure_future(queue.stop()))
            raise
        return queue

    async def stop(self) -> int:
        """Stops popping, completes what is in flight, and returns the next avail index.

        The stop goes on if its waiter is cancelled, and asking again waits for the same one.
        """
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        return await asyncio.shield(self._stopping)

    async def set_call(self, fd: int) -> None:
        """Replaces the call fd; -1 = none."""
        await self.iothread.call(lib.vhost_queue_set_call, self._native, fd)

    async def set_err(self, fd: int) -> None:
        """Replaces the error fd; -1 = none."""
        await self.iothread.call(lib.vhost_queue_set_err, self._native, fd)

    async def set_kick(self, fd: int) -> None:
        """Replaces the kick fd; -1 = the ring is always polled."""
        await self.iothread.call(lib.vhost_queue_set_kick, self._native, fd)

    async def set_enabled(self, enabled: bool) -> None:
        await self.iothread.call(lib.vhost_queue_set_enabled, self._native, enabled)

    async def set_memory(self, memory: GuestMemory) -> None:
        """Drains, then goes on in `memory`."""
        await self.iothread.call(lib.vhost_queue_set_memory, self._native, memory.native)

    async def _stop(self) -> int:
        next_index = await self.iothread.call(lib.vhost_queue_stop, self._native)
        self._release()
        return next_index

    def _release(self) -> None:
        self.iothread.forget_broken(self._token)
        self.iothread.queues -= 1
        result = lib.vhost_queue_free(self._native)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "queue that was stopped")
        self._native = None
