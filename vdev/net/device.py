"""The network card on a tap.

The frames themselves go between tap and guest in the native half; this is what surrounds them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.iothread import IOThread
from vdev.net import tap as taps
from vdev.net.card import Card, parse_mac, stable_mac
from vdev.net.tap import Tap

_OFFLOADS = {
    lib.VIRTIO_NET_F_GUEST_CSUM: taps.OFFLOAD_CSUM,
    lib.VIRTIO_NET_F_GUEST_TSO4: taps.OFFLOAD_TSO4,
    lib.VIRTIO_NET_F_GUEST_TSO6: taps.OFFLOAD_TSO6,
    lib.VIRTIO_NET_F_GUEST_ECN: taps.OFFLOAD_TSO_ECN,
}
_ETHERTYPE_RARP = 0x8035
_FRAME_MIN = 60


class NetDevice(Card):
    """A virtio-net device on an open tap, one queue pair to each queue of the tap.

    `mac`: "52:54:00:12:34:56"; without one, an address that is the same for the same tap name on
    the same host.  `mtu`: see `Card`.  The tap stays the caller's to close.
    Raises UserError for a MAC address that no station can have.
    """

    def __init__(
        self,
        tap: Tap,
        *,
        iothreads: Sequence[IOThread],
        name: str = "net",
        mac: str | None = None,
        mtu: int | None = None,
    ) -> None:
        super().__init__(
            iothreads=iothreads,
            name=name,
            mac=parse_mac(mac) if mac is not None else stable_mac(tap.name),
            mtu=mtu,
            pairs=len(tap.fds),
        )
        self.tap = tap
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

    def announce(self, mac: bytes) -> None:
        """Sends a RARP request in the guest's name, from which switches learn where it is."""
        request = b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + bytes(4) + mac + bytes(4)
        ethernet = b"\xff" * 6 + mac + _ETHERTYPE_RARP.to_bytes(2, "big")
        self.tap.send((ethernet + request).ljust(_FRAME_MIN, b"\0"))

    def _apply_mtu(self, mtu: int) -> None:
        self.tap.set_mtu(mtu)

    def _apply_link(self, up: bool) -> None:
        self.tap.set_carrier(up)
