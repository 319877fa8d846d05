"""What a virtio device is to those who serve it, whatever transport brings its rings.

A transport asks a device to `start_queue`, and never learns who carries the requests: the native
half of a `NativeDevice`, in this process, or another program.  Python sees features, the
configuration space and the life cycle.  A device never learns which transport it is served by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import NotSupported, PeerError
from vdev.iothread import IOThread
from vdev.memory import GuestMemory
from vdev.metrics import device_stats
from vdev.virtio.queue import Queue, QueueConfig, ServedQueue


class Device(ABC):
    """A virtio device.  Subclasses set the attributes before they are served.

    name: kind and instance, for logs and metrics ("blk disk0").
    device_id: virtio device id (virtio 1.3, section 5).
    num_queues: virtqueues handed to this device.
    features: the virtio feature bits that it offers, those of its rings included.
    iothreads: threads of this process that its queues run on, if any do.
    queue_groups: groups that front-ends treat as devices of their own: a net device's pairs.
    supports_multiqueue: a front-end may ask how many queues there are.  Front-ends differ on
        whether net's are pairs, so a card of one pair is better not asked.
    supports_mtu, supports_rarp: `set_mtu` and `announce` do something.
    supports_log: its queues can log what they write (`Queue.set_log`).
    supports_inflight: its queues can note what is in flight (`QueueConfig.inflight`).  A device
        that completes in order needs no notes: its used index tells what is left.
    supports_iommu: its queues can work in what an IOMMU shows of memory (`MemoryView`).
    config_changed: called without arguments when the configuration space changed by itself.
    """

    name: str
    device_id: int
    num_queues: int
    features: int
    iothreads: Sequence[IOThread] = ()
    queue_groups: int = 1
    supports_multiqueue: bool = True
    supports_mtu: bool = False
    supports_rarp: bool = False
    supports_log: bool = False
    supports_inflight: bool = False
    supports_iommu: bool = False

    def __init__(self) -> None:
        self.config_changed: list[Callable[[], None]] = []

    @abstractmethod
    def config(self) -> bytes:
        """The whole configuration space, little endian."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes `data` at `offset`, which lies within the space.

        Raises PeerError where a field is read-only.
        """
        raise PeerError(f"{self.name}: the configuration space is read-only")

    def negotiate(self, features: int) -> None:
        """The driver accepted these features, a subset of those offered; no queue runs yet.

        Raises PeerError where the device cannot work with them.
        """
        if extra := features & ~self.features:
            raise PeerError(f"{self.name}: features {extra:#x} were never offered")

    @abstractmethod
    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> Queue:
        """Has the ring served from now on; `on_broken(fault)` tells of a ring that broke.

        Raises PeerError where the configuration is wrong, OSError where it cannot be served.
        """

    @abstractmethod
    def reset(self) -> None:
        """The driver let go of the device; no queue runs.

        QEMU resets a device also when its guest is paused, and does not say again afterwards what
        the guest wrote to the configuration space: that stays until `release`.
        """

    def release(self) -> None:
        """The front-end is gone: back to the state before it came; no queue runs."""
        self.reset()

    def hold(self, on: bool) -> None:  # noqa: B027  (most give nothing back)
        """From True to False no queue runs, and the device keeps what running queues need all the
        same: they go on soon, here or in another process."""

    def queue_enabled(self, index: int, enabled: bool) -> None:  # noqa: B027  (most need not know)
        """Queue `index` was enabled or disabled."""

    def set_mtu(self, mtu: int) -> None:
        """The largest frame payload, in bytes, that the front-end wants."""
        raise NotSupported(f"{self.name}: this device has no MTU")

    def announce(self, mac: bytes) -> None:
        """Tells the network that `mac` (6 bytes) is reached here now (RARP, after a migration)."""
        raise NotSupported(f"{self.name}: this device does not announce itself")

    def set_link(self, up: bool) -> None:
        """Plugs or pulls a card's cable; the driver is told. Raises OSError where that fails."""
        raise NotSupported(f"{self.name}: there is no cable here to plug or pull")

    def notify_config(self) -> None:
        """Tells all transports that the configuration space changed."""
        for callback in tuple(self.config_changed):
            callback()

    def save(self) -> dict[str, Any]:
        """What a driver has set that the features and queues do not tell, as JSON can hold it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """What `save` gave. Raises ValueError where it is not of such a device."""
        if state:
            raise ValueError(f"{self.name}: it has no state of its own")

    def describe(self) -> dict[str, Any]:
        """What stands behind the device, for people and programs that watch it."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Counters per queue and in total, where there are any: see `vdev.metrics.device_stats`."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Releases everything; no queue runs."""


class NativeDevice(Device):
    """A device whose requests libvhost carries, on `iothreads`: a queue goes where fewest are.

    native: `struct vhost_device *`, whose queue indexes are 0 … num_queues - 1; `close` frees it.
    The threads stay the caller's.
    """

    supports_log = True
    native: Any

    def __init__(self, iothreads: Sequence[IOThread]) -> None:
        super().__init__()
        self.iothreads = iothreads

    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> ServedQueue:
        iothread = min(self.iothreads, key=lambda thread: thread.queues)
        return await ServedQueue.start(config, self, memory, iothread, on_broken)

    def stats(self) -> dict[str, Any]:
        return device_stats(self.native, self.num_queues)

    def close(self) -> None:
        if self.native:
            lib.vhost_device_free(self.native)
            self.native = ffi.NULL
