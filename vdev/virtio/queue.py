"""The served queue: what a transport asks for, and the owned queue it gets.

configuration → `Device.start_queue` → a `Queue` that only its owner touches → `stop` hands it back
as the index to go on from.  vhost-user gets the two fds from its front-end; other transports make
them themselves; nothing here can tell.  Nor can a transport tell who carries the requests: a
`ServedQueue` is owned by an iothread of this process, others by another process.
"""

from __future__ import annotations

import asyncio
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from vdev._native import ffi, lib
from vdev.dirtylog import DirtyLog, log_arguments
from vdev.errors import NotSupported, PeerError
from vdev.inflight import InflightRegion
from vdev.iothread import IOThread, new_token, settle
from vdev.memory import GuestMemory
from vdev.record import Record

_START_ERRORS = {
    errno.EINVAL: "its size, the alignment of its parts or its next index is wrong"
    " (virtio 1.3, sections 2.7 and 2.8)",
    errno.EFAULT: "a part of it lies outside guest memory",
    errno.ERANGE: "the device has no queue of that index",
    errno.EBADMSG: "its in-flight region says what cannot be",
    errno.ENODATA: "the file of its in-flight region was truncated",
    errno.EOPNOTSUPP: "the device cannot note what is in flight",
}


F_RING_PACKED: int = 1 << lib.VIRTIO_F_RING_PACKED


def first_index(features: int) -> int:
    """Where a queue begins that is new: a packed ring's wrap counters are 1 (virtio 1.3, 2.8.1)."""
    return 0x80008000 if features & F_RING_PACKED else 0


def index_bits(features: int) -> int:
    """How wide a next index is: of a packed ring it has the used index as well."""
    return 32 if features & F_RING_PACKED else 16


class QueueConfig(Record):
    """Everything a queue needs besides memory and device.

    features: those that were negotiated, which say whether its ring is packed.  desc, avail, used:
    guest physical addresses, or IOVAs in a `MemoryView`; of a packed ring those of the descriptors,
    and of the driver's and the device's event suppression.  next_index: where to go on, as in
    `struct vhost_queue_config`.
    fds: eventfds, or -1; they stay the caller's.  log, log_used: as for `Queue.set_log`.
    inflight: where what is in flight is noted; if it was in use before, the queue goes on from it,
    and next_index does not count (`Device.supports_inflight`).
    gate: awaited before the ring is touched, when all that may be wrong has been found.
    on_miss: called with an IOVA, and the access (enum vhost_access) for which the queue's view of
    memory has no translation; the queue waits for another view then (`Device.supports_iommu`).
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
    log: DirtyLog | None = None
    log_used: int | None = None
    inflight: InflightRegion | None = None
    gate: Callable[[], Awaitable[None]] | None = None
    on_miss: Callable[[int, int], None] | None = None


class Queue(ABC):
    """A queue that runs, from `Device.start_queue` to `stop`; the changes take effect in order.

    fault: how its guest, or who served it, broke it; None while it is whole.
    Every method raises OSError where who serves the queue cannot be told.
    """

    fault: str | None = None

    @abstractmethod
    async def stop(self) -> int:
        """Stops popping, completes what is in flight, and returns the next index.

        The stop goes on if its waiter is cancelled, and asking again waits for the same one.
        """

    async def suspend(self) -> int:
        """As `stop`; what has not begun may stay in flight, where `QueueConfig.inflight` has it."""
        return await self.stop()

    @abstractmethod
    async def set_call(self, fd: int) -> None:
        """Replaces the call fd; -1 = none."""

    @abstractmethod
    async def set_err(self, fd: int) -> None:
        """Replaces the error fd; -1 = none."""

    @abstractmethod
    async def set_kick(self, fd: int) -> None:
        """Replaces the kick fd; -1 = the ring is always polled."""

    @abstractmethod
    async def set_enabled(self, enabled: bool) -> None:
        """Has the queue served, or left alone where it is."""

    @abstractmethod
    async def set_memory(self, memory: GuestMemory) -> None:
        """Drains, then goes on in `memory`."""

    async def extend_memory(self, memory: GuestMemory) -> None:
        """Goes on in `memory` without a drain: all that the present one has is there."""
        await self.set_memory(memory)

    async def set_log(self, log: DirtyLog | None, used: int | None = None) -> None:
        """Logs what is written to guest memory from the answer on; None = no longer.

        Requests that are in flight then are logged when they complete.  used: the guest address at
        which the used ring is logged, or None.  A write that the log has no bit for breaks the
        queue.  Raises NotSupported where who serves the queue cannot log (`Device.supports_log`).
        """
        raise NotSupported("this queue does not log what it writes")


class BrokenQueue(Queue):
    """What is left of a queue that broke in another process: nobody serves it, but it stops."""

    def __init__(self, fault: str, next_index: int) -> None:
        self.fault = fault
        self._next_index = next_index

    async def stop(self) -> int:
        return self._next_index

    async def set_call(self, fd: int) -> None:
        pass

    async def set_err(self, fd: int) -> None:
        pass

    async def set_kick(self, fd: int) -> None:
        pass

    async def set_enabled(self, enabled: bool) -> None:
        pass

    async def set_memory(self, memory: GuestMemory) -> None:
        pass

    async def set_log(self, log: DirtyLog | None, used: int | None = None) -> None:
        pass


class NativeHalf(Protocol):
    """Whose requests libvhost carries."""

    @property
    def native(self) -> Any:
        """The `struct vhost_device *`."""


class ServedQueue(Queue):
    """A queue that runs on an iothread.

    on_stopped: awaited without arguments when it has drained, before `stop` returns.
    """

    def __init__(self, native: Any, token: int, iothread: IOThread, device: NativeHalf) -> None:
        self._native = native
        self._token = token
        self._device = device  # the native queue works in it
        self._stopping: asyncio.Task[int] | None = None
        self.iothread = iothread
        self.on_stopped: Callable[[], Awaitable[None]] | None = None

    @classmethod
    async def start(
        cls,
        config: QueueConfig,
        device: NativeHalf,
        memory: GuestMemory,
        iothread: IOThread,
        on_broken: Callable[[str], None] | None = None,
    ) -> ServedQueue:
        """Starts to serve the ring; `on_broken(fault)` tells of a ring that its guest broke.

        Raises PeerError where the configuration is wrong, OSError where the host fails.
        """
        token = new_token()
        log, log_used = log_arguments(config.log, config.log_used)
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
                "log": log,
                "log_used": log_used,
                "inflight": config.inflight.native if config.inflight else ffi.NULL,
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
        if config.on_miss is not None:
            iothread.on_miss(token, config.on_miss)
        iothread.queues += 1
        try:
            if config.gate is not None:
                await config.gate()
        except BaseException:
            queue._release()
            raise
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
        return await self._end(lib.vhost_queue_stop)

    async def suspend(self) -> int:
        return await self._end(lib.vhost_queue_suspend)

    async def _end(self, how: Any) -> int:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(how))
        return await asyncio.shield(self._stopping)

    async def set_call(self, fd: int) -> None:
        await self.iothread.call(lib.vhost_queue_set_call, self._native, fd)

    async def set_err(self, fd: int) -> None:
        await self.iothread.call(lib.vhost_queue_set_err, self._native, fd)

    async def set_kick(self, fd: int) -> None:
        await self.iothread.call(lib.vhost_queue_set_kick, self._native, fd)

    async def set_enabled(self, enabled: bool) -> None:
        await self.iothread.call(lib.vhost_queue_set_enabled, self._native, enabled)

    async def set_memory(self, memory: GuestMemory) -> None:
        await self.iothread.call(lib.vhost_queue_set_memory, self._native, memory.native)

    async def extend_memory(self, memory: GuestMemory) -> None:
        await self.iothread.call(lib.vhost_queue_extend_memory, self._native, memory.native)

    async def set_log(self, log: DirtyLog | None, used: int | None = None) -> None:
        await self.iothread.call(lib.vhost_queue_set_log, self._native, *log_arguments(log, used))

    async def _stop(self, how: Any) -> int:
        next_index = await self.iothread.call(how, self._native)
        self._release()
        if self.on_stopped is not None:
            await self.on_stopped()
        return next_index

    def _release(self) -> None:
        self.iothread.forget(self._token)
        self.iothread.queues -= 1
        result = lib.vhost_queue_free(self._native)
        if result < 0:
            raise OSError(-result, os.strerror(-result), "queue that was stopped")
        self._native = None
