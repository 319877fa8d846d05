"""A back-end on the event loop: a `Frontend` on a thread of its own, and a watch over its end.

Theory of operation.  A `Frontend` blocks, so all that is asked of it runs on one thread, in the
order in which it was asked for.  A back-end may die or lie at any time.  While nothing is being
asked its socket is watched: an end, or a word unasked, loses the back-end, as does an answer that
is wrong or late.  Then `lost` tells of it, and all that is asked afterwards fails at once.

A back-end that ended, and did not lie, may come back: where it notes what is in flight, and it was
reached by a path, the thread connects to the next one, for some time, and says all again, with the
same in-flight region.  What is asked meanwhile waits its turn on the thread, and what had failed is
asked once more; so nobody but the driver notices, by a pause.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import GuestMemory, Region
from vdev.ratelog import RateLimitedLog
from vdev.virtio.queue import F_RING_PACKED, QueueConfig
from vdev.virtio.vhost_user.frontend import Frontend, SharedRegion
from vdev.virtio.vhost_user.payloads import Inflight

T = TypeVar("T")

_log = logging.getLogger("vdev.remote")
_F_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_QUEUE_SIZE = 1024
"""Entries of the largest queue that the in-flight region has room for."""
_RETRY_FIRST = 0.01  # seconds
_RETRY_MOST = 1.0
_F_STATUS: int = lib.VHOST_USER_PROTOCOL_F_STATUS
_DRIVER: int = lib.VIRTIO_STATUS_ACKNOWLEDGE | lib.VIRTIO_STATUS_DRIVER
_FEATURES_OK: int = _DRIVER | lib.VIRTIO_STATUS_FEATURES_OK
_DRIVER_OK: int = _FEATURES_OK | lib.VIRTIO_STATUS_DRIVER_OK


@dataclass(frozen=True)
class Again:
    """How to reach the next back-end.

    connect: gives a connection, or raises OSError.  num_queues: of the device.  seconds: how long
    one may be away.
    """

    connect: Callable[[], socket.socket]
    num_queues: int
    seconds: float


class Link:
    """Owns a front-end, made by `open`.

    name: of the device, for the log.  fault: why the back-end is lost, or None.
    lost: called with that reason, once.
    again: how to reach the next back-end; None = not at all.
    returned: called on the thread when another back-end has taken over, before its rings start.
    """

    def __init__(self, frontend: Frontend, executor: Executor, name: str) -> None:
        self.frontend = frontend
        self.name = name
        self.fault: str | None = None
        self.lost: list[Callable[[str], None]] = []
        self.again: Again | None = None
        self.returned: Callable[[], None] | None = None
        self.warnings = RateLimitedLog(_log)
        self._executor = executor
        self.loop = asyncio.get_running_loop()
        self._asking = 0
        self._closed = False
        self._closing = threading.Event()
        self._watched = False
        # The thread's own:
        self._features: int | None = None
        self._inflight: tuple[Inflight, int] | None = None
        self._memory: GuestMemory | None = None
        self._rings: dict[int, QueueConfig] = {}
        self._watch()

    @classmethod
    async def open(cls, opened: Callable[[], Frontend], name: str) -> Link:
        """Has the thread call `opened`, and raises what that raises."""
        executor = _one_thread()
        opening = asyncio.get_running_loop().run_in_executor(executor, opened)
        try:
            return cls(await asyncio.shield(opening), executor, name)
        except BaseException:
            opening.add_done_callback(_close_opened)
            executor.shutdown(wait=False)
            raise

    @property
    def asking(self) -> int:
        """How much is being asked, or waits for its turn."""
        return self._asking

    def rest(self) -> None:
        """Ends the thread, which what is asked next starts anew; nothing is being asked."""
        self._executor.shutdown(wait=True)
        self._executor = _one_thread()

    def close(self) -> None:
        """Ends the connection, and what is being asked; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        self._unwatch()
        self.frontend.abort()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.frontend.close()
        self._drop_inflight()
        self._memory = None
        self._rings.clear()
        self.returned = None

    # Asking

    async def call(self, fn: Callable[..., T], *args: Any) -> T:
        """Runs `fn` on the thread.  It goes on if its waiter is cancelled."""
        return await asyncio.shield(self._submit(fn, *args))

    def post(self, fn: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """The same for one who does not wait: a refusal is logged."""
        future = self._submit(fn, *args)
        future.add_done_callback(self._log_refusal)
        return future

    def _submit(self, fn: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        self._unwatch()
        self._asking += 1
        future = self.loop.run_in_executor(self._executor, partial(self._try, fn, *args))
        future.add_done_callback(self._answered)
        return future

    def _answered(self, future: asyncio.Future[Any]) -> None:
        self._asking -= 1
        if not future.cancelled():
            future.exception()  # nobody need be waiting any more
        if self._closed:
            return
        if self.frontend.failed is not None:
            self._lose(self.frontend.failed)
        elif not self._asking:
            self._watch()

    def _log_refusal(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, PeerError) and self.fault is None:
            self.warnings.warning("%s: %s", self.name, error)

    # On the thread

    def start_ring(self, config: QueueConfig, memory: GuestMemory, features: int) -> None:
        """Starts a ring; before the first, all that the back-end needs to know is said."""
        if self._features is None:
            self._prepare(features)
            self._features = features
        self._give(memory)
        self.frontend.start_ring(config)
        self._rings[config.index] = config

    def set_call(self, config: QueueConfig) -> None:
        """The ring has the call fd of `config`."""
        self.frontend.set_call(config.index, config.call_fd)
        self._rings[config.index] = config

    def set_kick(self, config: QueueConfig) -> None:
        """The ring has the kick fd of `config`."""
        self.frontend.set_kick(config.index, config.kick_fd)
        self._rings[config.index] = config

    def enable_ring(self, config: QueueConfig) -> None:
        """The ring is served, or left alone, as `config` says."""
        self.frontend.enable_ring(config.index, config.enabled)
        self._rings[config.index] = config

    def move_ring(self, config: QueueConfig, memory: GuestMemory) -> None:
        """Drains, then goes on in `memory`."""
        base = self.frontend.stop_ring(config.index)
        self._give(memory)
        self.frontend.start_ring(replace(config, next_index=base))
        self._rings[config.index] = config

    def stop_ring(self, index: int) -> int:
        """Stops and drains a ring; the avail index to go on from."""
        base = self.frontend.stop_ring(index)
        self._rings.pop(index, None)
        return base

    def reset(self) -> None:
        """The driver let go of the device."""
        self._features = None
        self._drop_inflight()
        self.frontend.reset_device()

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None

    def _prepare(self, features: int) -> None:
        frontend = self.frontend
        has_status = frontend.has_protocol(_F_STATUS)
        if has_status:
            frontend.set_status(_DRIVER)
        frontend.set_features(features)
        if has_status:
            frontend.set_status(_FEATURES_OK)
            if not frontend.get_status() & lib.VIRTIO_STATUS_FEATURES_OK:
                raise PeerError(f"the back-end does not work with the features {features:#x}")
        if self.again is not None and frontend.has_protocol(_F_INFLIGHT):
            # After the features, which tell the layout of the rings.
            if self._inflight is None:
                self._inflight = frontend.get_inflight(self.again.num_queues, _QUEUE_SIZE)
            frontend.set_inflight(*self._inflight)
        if has_status:
            frontend.set_status(_DRIVER_OK)

    def _give(self, memory: GuestMemory) -> None:
        if memory is not self._memory:
            self.frontend.set_memory([_shared(region) for region in memory.regions])
            self._memory = memory

    def _try(self, fn: Callable[..., T], *args: Any) -> T:
        """Asks again where the back-end ended meanwhile and another came."""
        while True:
            if self._may_return():
                self._await_return()
            try:
                return fn(*args)
            except (OSError, PeerError):
                if not self._may_return():
                    raise

    def _may_return(self) -> bool:
        return (
            self.again is not None
            and self.frontend.ended
            and not self._closing.is_set()
            and self.fault is None
            and self.frontend.has_protocol(_F_INFLIGHT)
        )

    def _await_return(self) -> None:
        """Returns when another back-end has all that the last one had.

        Raises OSError or PeerError where none comes in time, or it is another one.
        """
        assert self.again is not None
        frontend, why = self.frontend, self.frontend.failed
        self.warnings.warning("%s: the back-end is away: %s", self.name, why)
        protocol, offered = frontend.protocol_features, frontend.offered
        began = time.monotonic()
        delay = _RETRY_FIRST
        while True:
            try:
                frontend.adopt(self.again.connect())
                frontend.negotiate_protocol(protocol)
                if lacks := (protocol & ~frontend.protocol_features) | offered & ~frontend.offered:
                    raise PeerError(f"another back-end came that lacks the features {lacks:#x}")
                self._say_again()
                break
            except OSError as error:
                frontend.protocol_features = protocol
                frontend.failed, frontend.ended = f"{why}, and {error}", True
                unreachable = isinstance(error, FileNotFoundError | PermissionError)
                most = min(_RETRY_MOST, self.again.seconds) if unreachable else self.again.seconds
                if time.monotonic() >= began + most or self._closing.wait(delay):
                    frontend.ended = False
                    raise
                delay = min(2 * delay, _RETRY_MOST)
            except PeerError as error:
                frontend.failed, frontend.ended = str(error), False
                raise
        self.warnings.warning("%s: the back-end is back", self.name)

    def _say_again(self) -> None:
        if self._features is not None:
            self._prepare(self._features)
        if self._memory is not None:
            self.frontend.set_memory([_shared(region) for region in self._memory.regions])
        if self.returned is not None:
            self.returned()
        for config in self._rings.values():
            assert self._memory is not None
            base = used_index(config, self._memory)
            self.frontend.start_ring(replace(config, next_index=base))
            # What was said by either side to the one that ended may have been heard by nobody.
            for fd in (config.kick_fd, config.call_fd):
                if fd >= 0:
                    os.eventfd_write(fd, 1)

    # The end of the back-end

    def _watch(self) -> None:
        if not self._watched and self.fault is None:
            self._watched = True
            self.loop.add_reader(self.frontend.sock.fileno(), self._spoken_unasked)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self.loop.remove_reader(self.frontend.sock.fileno())

    def _spoken_unasked(self) -> None:
        try:
            data = self.frontend.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error.strerror or str(error))
        else:
            if data:
                self._lose("it said something unasked")
            else:
                self._ended("it ended the connection")

    def _ended(self, reason: str) -> None:
        self.frontend.failed, self.frontend.ended = reason, True
        if self._may_return():
            self.post(lambda: None)  # which will find that out, on the thread
        else:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if self.fault is not None:
            return
        self._unwatch()
        self.fault = self.frontend.failed = reason
        self.frontend.abort()
        self.warnings.warning("%s: the back-end is lost: %s", self.name, reason)
        for callback in tuple(self.lost):
            callback(reason)


def used_index(config: QueueConfig, memory: GuestMemory) -> int:
    """The used ring's `idx` (virtio 1.3, section 2.7.8): as many chains were completed.

    A packed ring has none: where it began.
    """
    if config.features & F_RING_PACKED:
        return config.next_index
    at = config.used + 2
    for region in memory.regions:
        if region.guest_addr <= at < region.guest_addr + region.size:
            data = os.pread(region.fd, 2, region.offset + at - region.guest_addr)
            return int.from_bytes(data, "little")
    return config.next_index


def _one_thread() -> Executor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="vhost-user")


def _shared(region: Region) -> SharedRegion:
    if region.fd < 0:
        raise ValueError(f"{region}: mapped without shared=True, so no back-end can have it")
    return SharedRegion(region.guest_addr, region.size, region.user_addr, region.offset, region.fd)


def _close_opened(opening: asyncio.Future[Frontend]) -> None:
    """Nobody waits for the connection any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
