"""The virtio network device: features, config space, link state (virtio 1.3, section 5.1).

The frames themselves go between tap and guest in the native half; this is what surrounds them.
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
from vdev.net import tap as taps
from vdev.net.tap import Tap
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
_OFFLOADS = {
    lib.VIRTIO_NET_F_GUEST_CSUM: taps.OFFLOAD_CSUM,
    lib.VIRTIO_NET_F_GUEST_TSO4: taps.OFFLOAD_TSO4,
    lib.VIRTIO_NET_F_GUEST_TSO6: taps.OFFLOAD_TSO6,
    lib.VIRTIO_NET_F_GUEST_ECN: taps.OFFLOAD_TSO_ECN,
}
_ETHERTYPE_RARP = 0x8035
_FRAME_MIN = 60


class NetDevice(NativeDevice):
    """A virtio-net device on an open tap, one queue pair to each queue of the tap.

    `mac`: "52:54:00:12:34:56"; without one, an address that is the same for the same tap name on
    the same host.  `mtu` in bytes is told to the guest; None = Ethernet's usual one, which is not.
    The tap stays the caller's to close.
    Raises UserError for a MAC address that no station can have.
    """

    device_id = lib.VIRTIO_ID_NET
    supports_mtu = True
    supports_rarp = True
    supports_iommu = True

    def __init__(
        self,
        tap: Tap,
        *,
        iothreads: Sequence[IOThread],
        name: str = "net",
        mac: str | None = None,
        mtu: int | None = None,
    ) -> None:
        super().__init__(iothreads)
        self.name = name
        self.tap = tap
        self.mac = parse_mac(mac) if mac is not None else stable_mac(tap.name)
        self.mtu = mtu
        self._mtu_told = mtu  # which a front-end may have set
        self.link_up = True
        self.num_queues = 2 * len(tap.fds)
        self.queue_groups = len(tap.fds)
        self.features: int = RING_FEATURES | sum(1 << bit for bit in _FEATURES)
        if mtu is not None:
            self.features |= 1 << lib.VIRTIO_NET_F_MTU
        if len(tap.fds) > 1:
            # MQ requires CTRL_VQ (virtio 1.3, section 5.1.3.1), whose queue the VMM serves.
            self.features |= 1 << lib.VIRTIO_NET_F_MQ | 1 << lib.VIRTIO_NET_F_CTRL_VQ
        self.supports_multiqueue = len(tap.fds) > 1
        self.native = self._new_native()

    def _new_native(self) -> Any:
        fds = ffi.new("int[]", self.tap.fds)
        config = ffi.new("struct vhost_net_config *")
        config.tap_fds = fds
        config.num_pairs = len(self.tap.fds)
        out = ffi.new("struct vhost_device **")
        result = lib.vhost_net_new(config, out)
        if result < 0:
            raise OSError(-result, os.strerror(-result), f"net device on tap {self.tap.name}")
        return out[0]

    def config(self) -> bytes:
        """The config space (struct virtio_net_config)."""
        space = ffi.new("struct virtio_net_config *")
        space.mac = self.mac
        space.status = lib.VIRTIO_NET_S_LINK_UP if self.link_up else 0
        space.max_virtqueue_pairs = len(self.tap.fds)
        space.mtu = self._mtu_told or 0
        return bytes(ffi.buffer(space))

    def negotiate(self, features: int) -> None:
        """Has the tap speak as the driver does: header, byte order, and unfinished frames."""
        super().negotiate(features)
        version_1 = bool(features >> lib.VIRTIO_F_VERSION_1 & 1)
        # virtio 1.3, section 5.1.6.1: num_buffers is there from VERSION_1 or MRG_RXBUF on.
        long_header = version_1 or features >> lib.VIRTIO_NET_F_MRG_RXBUF & 1
        short = ffi.offsetof("struct virtio_net_hdr", "num_buffers")
        length = ffi.sizeof("struct virtio_net_hdr") if long_header else short
        self.tap.set_header(length, little_endian=version_1)
        offloads = sum(value for bit, value in _OFFLOADS.items() if features >> bit & 1)
        # Segments need checksums (section 5.1.3.1); the kernel refuses the one without the other.
        self.tap.set_offloads(offloads if offloads & taps.OFFLOAD_CSUM else 0)

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

    def describe(self) -> dict[str, Any]:
        """The tap, and whether the link is up."""
        return {"kind": "net", "tap": self.tap.name, "link_up": self.link_up}

    def reset(self) -> None:
        """As a new driver finds it: one queue pair, no offloads."""
        # A tap that was deleted under us has nothing left to reset.
        with contextlib.suppress(OSError):
            for pair in range(1, len(self.tap.fds)):
                self.tap.attach_queue(pair, False)
            self.tap.set_offloads(0)

    def queue_enabled(self, index: int, enabled: bool) -> None:
        """The kernel sends nothing to a pair whose receive queue is disabled.

        The first pair's stays: all traffic is on it where the driver knows of no other.
        """
        pair, transmits = divmod(index, 2)
        if pair and not transmits:
            self.tap.attach_queue(pair, enabled)

    def set_mtu(self, mtu: int) -> None:
        """Sets the tap's MTU in bytes, and what the driver finds, until the front-end leaves.

        Raises PeerError out of virtio's range, OSError where the tap is gone.
        """
        if not lib.VIRTIO_NET_MTU_MIN <= mtu <= lib.VIRTIO_NET_MTU_MAX:
            raise PeerError(
                f"{self.name}: MTU {mtu}: {lib.VIRTIO_NET_MTU_MIN} to {lib.VIRTIO_NET_MTU_MAX}"
            )
        self.tap.set_mtu(mtu)
        self._mtu_told = mtu

    def release(self) -> None:
        """A front-end's MTU goes with it."""
        super().release()
        if self._mtu_told != self.mtu:
            with contextlib.suppress(OSError):  # as in `reset`
                self.tap.set_mtu(self.mtu or taps.MTU_USUAL)
            self._mtu_told = self.mtu

    def announce(self, mac: bytes) -> None:
        """Sends a RARP request in the guest's name, from which switches learn where it is."""
        request = b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + bytes(4) + mac + bytes(4)
        ethernet = b"\xff" * 6 + mac + _ETHERTYPE_RARP.to_bytes(2, "big")
        self.tap.send((ethernet + request).ljust(_FRAME_MIN, b"\0"))

    def set_link(self, up: bool) -> None:
        """Plugs or pulls the cable, at the tap too: the driver is told by a config notification.

        Raises OSError where the tap is gone.
        """
        if self.link_up != up:
            self.tap.set_carrier(up)
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
