"""What a virtio device is to those who serve it, whatever transport brings its rings.

A device owns its native half, which carries the requests; Python sees features, the configuration
space and the life cycle.  A device never learns which transport it is served by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from vdev.errors import NotSupported, PeerError
from vdev.metrics import device_stats


class Device(ABC):
    """A virtio device.  Subclasses set the attributes before they are served.

    name: kind and instance, for logs and metrics ("blk disk0").
    device_id: virtio device id (virtio 1.3, section 5).
    num_queues: virtqueues handed to this device.
    features: the virtio feature bits that it offers, those of its rings included.
    native: `struct vhost_device *`, whose queue indexes are 0 … num_queues - 1.
    queue_groups: groups that front-ends treat as devices of their own: a net device's pairs.
    supports_multiqueue: a front-end may ask how many queues there are.  Front-ends differ on
        whether net's are pairs, so a card of one pair is better not asked.
    supports_mtu, supports_rarp: `set_mtu` and `announce` do something.
    config_changed: called without arguments when the configuration space changed by itself.
    """

    name: str
    device_id: int
    num_queues: int
    features: int
    native: Any
    queue_groups: int = 1
    supports_multiqueue: bool = True
    supports_mtu: bool = False
    supports_rarp: bool = False

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
    def reset(self) -> None:
        """The driver let go of the device; no queue runs.

        QEMU resets a device also when its guest is paused, and does not say again afterwards what
        the guest wrote to the configuration space: that stays until `release`.
        """

    def release(self) -> None:
        """The front-end is gone: back to the state before it came; no queue runs."""
        self.reset()

    def queue_enabled(self, index: int, enabled: bool) -> None:  # noqa: B027  (most need not know)
        """Queue `index` was enabled or disabled."""

    def set_mtu(self, mtu: int) -> None:
        """The largest frame payload, in bytes, that the front-end wants."""
        raise NotSupported(f"{self.name}: this device has no MTU")

    def announce(self, mac: bytes) -> None:
        """Tells the network that `mac` (6 bytes) is reached here now (RARP, after a migration)."""
        raise NotSupported(f"{self.name}: this device does not announce itself")

    def notify_config(self) -> None:
        """Tells all transports that the configuration space changed."""
        for callback in tuple(self.config_changed):
            callback()

    def describe(self) -> dict[str, Any]:
        """What stands behind the device, for people and programs that watch it."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Counters per queue and in total, see `vdev.metrics.device_stats`."""
        return device_stats(self.native, self.num_queues)

    @abstractmethod
    def close(self) -> None:
        """Releases everything; no queue runs."""
