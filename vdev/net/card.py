"""The virtio network card: features, config space, link (virtio 1.3, section 5.1).

What is behind it, a tap or a switch, is its subclass's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError, UserError
from vdev.iothread import IOThread
from vdev.net.tap import MTU_USUAL
from vdev.virtio.device import NativeDevice
from vdev.virtio.spec import RING_FEATURES

_FEATURES = (
    lib.VIRTIO_NET_F_CSUM,
    lib.VIRTIO_NET_F_GUEST_CSUM,
    lib.VIRTIO_NET_F_MAC,
    lib.VIRTIO_NET_F_GUEST_TSO4,
    lib.VIRTIO_NET_F_GUEST_TSO6,
    lib.VIRTIO_NET_F_GUEST_ECN,
    lib.VIRTIO_NET_F_HOST_TSO4,
    lib.VIRTIO_NET_F_HOST_TSO6,
    lib.VIRTIO_NET_F_HOST_ECN,
    lib.VIRTIO_NET_F_MRG_RXBUF,
    lib.VIRTIO_NET_F_STATUS,
)


class Card(NativeDevice):
    """A virtio-net device of `pairs` queue pairs.

    `mac`: 6 bytes.  `mtu` in bytes is told to the guest; None = Ethernet's usual one, which is not.
    """

    device_id = lib.VIRTIO_ID_NET
    supports_mtu = True
    supports_rarp = True
    supports_iommu = True

    def __init__(
        self, *, iothreads: Sequence[IOThread], name: str, mac: bytes, mtu: int | None, pairs: int
    ) -> None:
        super().__init__(iothreads)
        self.name = name
        self.mac = mac
        self.mtu = mtu
        self._mtu_told = mtu  # which a front-end may have set
        self.link_up = True
        self.num_queues = 2 * pairs
        self.queue_groups = pairs
        self.features: int = RING_FEATURES | sum(1 << bit for bit in _FEATURES)
        if mtu is not None:
            self.features |= 1 << lib.VIRTIO_NET_F_MTU
        if pairs > 1:
            # MQ requires CTRL_VQ (virtio 1.3, section 5.1.3.1), whose queue the VMM serves.
            self.features |= 1 << lib.VIRTIO_NET_F_MQ | 1 << lib.VIRTIO_NET_F_CTRL_VQ
        self.supports_multiqueue = pairs > 1

    def _apply_mtu(self, mtu: int) -> None:
        """The network behind the card is to have this MTU. Raises OSError where it is gone."""

    def _apply_link(self, up: bool) -> None:
        """The same with the cable."""

    def config(self) -> bytes:
        """The config space (struct virtio_net_config)."""
        space = ffi.new("struct virtio_net_config *")
        space.mac = self.mac
        space.status = lib.VIRTIO_NET_S_LINK_UP if self.link_up else 0
        space.max_virtqueue_pairs = self.queue_groups
        space.mtu = self._mtu_told or 0
        return bytes(ffi.buffer(space))

    def save(self) -> dict[str, Any]:
        told = self._mtu_told if self._mtu_told != self.mtu else None
        return {"link_up": self.link_up, "mtu": told}

    def restore(self, state: dict[str, Any]) -> None:
        # Snapshots did not always have them.
        link_up, mtu = state.get("link_up", True), state.get("mtu")
        if (
            not isinstance(link_up, bool)
            or not (mtu is None or type(mtu) is int)
            or not state.keys() <= {"link_up", "mtu"}
        ):
            raise ValueError(f"{self.name}: not the state of a network card")
        if mtu is not None:
            self.set_mtu(mtu)
        self.set_link(link_up)

    def reset(self) -> None:
        pass

    def release(self) -> None:
        """A front-end's MTU goes with it."""
        super().release()
        if self._mtu_told != self.mtu:
            with contextlib.suppress(OSError):  # the network may be gone: nothing to put back
                self._apply_mtu(self.mtu or MTU_USUAL)
            self._mtu_told = self.mtu

    def set_mtu(self, mtu: int) -> None:
        """Sets the network's MTU in bytes, and what the driver finds, until the front-end leaves.

        Raises PeerError out of virtio's range, OSError where the network is gone.
        """
        if not lib.VIRTIO_NET_MTU_MIN <= mtu <= lib.VIRTIO_NET_MTU_MAX:
            raise PeerError(
                f"{self.name}: MTU {mtu}: {lib.VIRTIO_NET_MTU_MIN} to {lib.VIRTIO_NET_MTU_MAX}"
            )
        self._apply_mtu(mtu)
        self._mtu_told = mtu

    def set_link(self, up: bool) -> None:
        """Plugs or pulls the cable at both ends: the driver is told by a config notification.

        Raises OSError where the network is gone.
        """
        if self.link_up != up:
            self._apply_link(up)
            self.link_up = up
            self.notify_config()


def parse_mac(text: str) -> bytes:
    """The 6 bytes of "52:54:00:12:34:56". Raises UserError unless it names one station."""
    try:
        mac = bytes.fromhex(text.replace(":", " ").replace("-", " "))
    except ValueError:
        mac = b""
    if len(mac) != 6 or len(text) != 17:
        raise UserError(f"MAC address {text!r}: six bytes in hexadecimal, like 52:54:00:12:34:56")
    if mac[0] & 1 or not any(mac):
        raise UserError(f"MAC address {text!r}: a group's or empty; the first byte must be even")
    return mac


def stable_mac(name: str) -> bytes:
    """A locally administered address that differs between hosts and names, but not with time."""
    import hashlib  # maps a library of 5 MiB

    try:
        host = Path("/etc/machine-id").read_text().strip()
    except OSError:
        host = os.uname().nodename
    digest = hashlib.sha256(f"{host} guest {name}".encode()).digest()
    return bytes([(digest[0] & 0xFC) | 0x02, *digest[1:6]])
