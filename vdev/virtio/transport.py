"""What virtio-pci and virtio-mmio share: the life of a device as its driver steers it.

status register → features → queues (virtio 1.3, sections 2.1 and 3.1).  A transport supplies the
registers; here they become served queues.  The two eventfds of a queue are the transport's own:
the guest's notification signals the one (ioeventfd), the other is an interrupt (irqfd).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from vdev._native import lib
from vdev.dirtylog import DirtyLog
from vdev.errors import PeerError
from vdev.iothread import settle
from vdev.memory import GuestMemory
from vdev.ratelog import RateLimitedLog
from vdev.virtio.device import Device
from vdev.virtio.queue import Queue, QueueConfig, first_index, index_bits

QUEUE_SIZE_MAX = 256
FEATURE_WORDS = 2

_FEATURES_OK: int = lib.VIRTIO_STATUS_FEATURES_OK
_DRIVER_OK: int = lib.VIRTIO_STATUS_DRIVER_OK
_NEEDS_RESET: int = lib.VIRTIO_STATUS_NEEDS_RESET
_VERSION_1: int = 1 << lib.VIRTIO_F_VERSION_1

_log = logging.getLogger("vdev.virtio")


class QueueSetup(NamedTuple):
    """What the driver wrote of a queue: its size, and the guest addresses of its parts."""

    size: int
    desc: int
    avail: int
    used: int
    ready: bool


class Transport(ABC):
    """A device behind registers of our own machine."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.memory: GuestMemory | None = None
        self.log: DirtyLog | None = None
        self.kicks = [
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(device.num_queues)
        ]
        self._queues: dict[int, Queue] = {}
        self._next: dict[int, int] = {}
        self._lock = asyncio.Lock()
        self._warnings = RateLimitedLog(_log)
        self._features = 0
        self._suspended = False
        self._restored = False
        self._closed = False
        device.config_changed.append(self._config_changed)

    # What the registers hold

    @property
    @abstractmethod
    def status(self) -> int:
        """The device status as the driver reads it."""

    @status.setter
    @abstractmethod
    def status(self, value: int) -> None: ...

    @abstractmethod
    def driver_features(self) -> int:
        """What the driver accepted."""

    @abstractmethod
    def queue_setup(self, index: int) -> QueueSetup: ...

    @abstractmethod
    def call_fd(self, index: int) -> int:
        """The eventfd that interrupts for this queue, or -1."""

    @abstractmethod
    def clear_registers(self) -> None:
        """All that a driver writes is as at power-on, the status apart."""

    @abstractmethod
    def config_interrupt(self) -> None:
        """The configuration space, or the status, changed by itself: shows it, and interrupts."""

    # What the driver does

    async def write_status(self, value: int) -> None:
        """The driver wrote its status (virtio 1.3, section 2.1)."""
        async with self._lock:
            if self._closed:
                return
            if value == 0:
                await self._reset()
                return
            before, was_live = self.status, self._live()
            # A bit that is set stays until a reset: features never change under a running queue.
            value = value & ~_NEEDS_RESET | before
            if value & _FEATURES_OK and not before & _FEATURES_OK:
                if self._negotiate(self.driver_features()):
                    self._features = self.driver_features()
                else:
                    value &= ~_FEATURES_OK
            self.status = value
            if self._live() and not was_live:
                await self._start_queues()

    async def queue_ready(self, index: int) -> None:
        """The driver enabled a queue, which only counts later before DRIVER_OK, or took it back."""
        async with self._lock:
            if self._closed:
                return
            if not self.queue_setup(index).ready:
                await self._stop_queues(index)
                self._next.pop(index, None)
            elif self._live():
                await self._start_queue(index)

    async def queue_moved(self, index: int) -> None:
        """The interrupt of a queue is another one now."""
        async with self._lock:
            queue = self._queues.get(index)
            if self._closed or queue is None:
                return
            try:
                await queue.set_call(self.call_fd(index))
            except OSError as error:
                self._fail(str(error))

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space; what may not be written is left alone."""
        try:
            self.device.write_config(offset, data)
        except PeerError as error:
            self._warnings.warning("%s", error)

    # What the machine does

    async def set_log(self, log: DirtyLog | None) -> None:
        """Has all queues log what they write, these and later ones, or no more.

        Raises NotSupported where who serves them cannot (`Device.supports_log`).
        """
        async with self._lock:
            for index, queue in self._queues.items():
                await queue.set_log(log, self.queue_setup(index).used)
            self.log = log

    async def suspend(self) -> None:
        """Queues stop and drain, to go on with `resume`."""
        async with self._lock:
            self._suspended = True
            await self._stop_queues(*self._queues)

    async def resume(self) -> None:
        async with self._lock:
            self._suspended = False
            if not self._closed and self._live():
                await self._start_queues()
            if self._restored:
                self._restored = False
                self._call_all()

    async def reset(self) -> None:
        """As at power-on."""
        async with self._lock:
            if not self._closed:
                await self._reset()

    async def close(self) -> None:
        """Queues stop, and the eventfds are closed; the device stays its owner's.

        What the driver still wants, having waited for this, is forgotten.
        """
        async with self._lock:
            self._closed = True
            self.device.config_changed.remove(self._config_changed)
            await self._stop_queues(*self._queues)
            self.device.release()
            for fd in self.kicks:
                os.close(fd)
            self.kicks.clear()

    def save(self) -> dict[str, Any]:
        """While suspended: what was negotiated, and where each queue goes on."""
        return {
            "features": self._features,
            "next": {str(index): value for index, value in self._next.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `save` gave, before `resume`; the registers have been restored.

        Raises ValueError where it is not such a state.
        """
        features = state["features"]
        if type(features) is not int or features >> 32 * FEATURE_WORDS:
            raise ValueError("features that no device has")
        queues = {int(index): value for index, value in state["next"].items()}
        if not queues.keys() <= set(range(self.device.num_queues)):
            raise ValueError("queues that the device does not have")
        bits = index_bits(features)
        if any(type(value) is not int or value >> bits for value in queues.values()):
            raise ValueError("a queue cannot go on there")
        if self.status & _FEATURES_OK and not self._negotiate(features):
            raise ValueError("features that the device does not offer")
        self._features, self._next = features, queues
        self._suspended = self._restored = True

    def info(self) -> dict[str, Any]:
        """Status and queues, for people."""
        return {
            "status": self.status,
            "features": self._features,
            "queues": [
                {"index": index, "size": self.queue_setup(index).size, "broken": queue.fault}
                for index, queue in sorted(self._queues.items())
            ],
        }

    def _live(self) -> bool:
        wanted = _DRIVER_OK | _FEATURES_OK
        return self.status & wanted == wanted and not self._suspended

    def _negotiate(self, features: int) -> bool:
        try:
            if not features & _VERSION_1:
                raise PeerError(f"{self.device.name}: a driver without VIRTIO_F_VERSION_1")
            if extra := features & ~self.device.features:
                raise PeerError(f"{self.device.name}: features {extra:#x} were never offered")
            self.device.negotiate(features)
        except PeerError as error:
            self._warnings.warning("%s", error)
            return False
        return True

    async def _start_queues(self) -> None:
        for index in range(self.device.num_queues):
            await self._start_queue(index)

    async def _start_queue(self, index: int) -> None:
        setup = self.queue_setup(index)
        if not setup.ready or index in self._queues or self._suspended:
            return
        assert self.memory is not None
        config = QueueConfig(
            index=index,
            size=setup.size,
            features=self._features,
            desc=setup.desc,
            avail=setup.avail,
            used=setup.used,
            next_index=self._next.get(index, first_index(self._features)),
            kick_fd=self.kicks[index],
            call_fd=self.call_fd(index),
            log=self.log,
            log_used=setup.used,
        )

        def broken(fault: str) -> None:
            self._fail(f"queue {index} broke by its guest's fault: {fault}")

        self.device.queue_enabled(index, True)
        try:
            self._queues[index] = await self.device.start_queue(config, self.memory, broken)
        except (PeerError, OSError) as error:
            self._fail(str(error))

    def _call_all(self) -> None:
        """An interrupt may have been on its way when the state was saved: one more does no harm."""
        for index in self._queues:
            if (fd := self.call_fd(index)) >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(fd, 1)

    def _fail(self, why: str) -> None:
        """The driver has to reset the device (virtio 1.3, section 2.1.2)."""
        self._warnings.warning("%s: %s", self.device.name, why)
        self.status |= _NEEDS_RESET
        self.config_interrupt()

    async def _stop_queues(self, *indexes: int) -> None:
        """Those that run, at once: each drains its own requests.

        Whoever is cancelled waiting for it has waited all the same: what comes next frees the
        device that the queues work in.
        """
        await settle(asyncio.ensure_future(self._stop(indexes)))

    async def _stop(self, indexes: Iterable[int]) -> None:
        queues = {index: self._queues.pop(index) for index in indexes if index in self._queues}
        ends = await asyncio.gather(
            *(queue.stop() for queue in queues.values()), return_exceptions=True
        )
        for index, end in zip(queues, ends, strict=True):
            if isinstance(end, BaseException):
                self._warnings.warning("%s: stopping a queue: %s", self.device.name, end)
            else:
                self._next[index] = end

    async def _reset(self) -> None:
        await self._stop_queues(*self._queues)
        self._next.clear()
        self._features = 0
        self.clear_registers()
        self.status = 0
        self.device.reset()

    def _config_changed(self) -> None:
        if self.status & _DRIVER_OK:
            self.config_interrupt()
        else:
            self.show_config()

    @abstractmethod
    def show_config(self) -> None:
        """Copies the device's configuration space into the registers."""
