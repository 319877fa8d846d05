"""The entropy device (virtio 1.3, section 5.4): its one queue carries buffers to fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vdev._native import lib
from vdev.iothread import IOThread
from vdev.virtio.batch import BatchDevice, Chain

CHAIN_MOST = 4096
"""Bytes given for a buffer however large it is: a driver that wants more asks again."""


class RngDevice(BatchDevice):
    """A virtio-rng device.

    source: gives that many random bytes; the host's generator by default.
    """

    device_id = lib.VIRTIO_ID_RNG

    def __init__(
        self,
        *,
        iothreads: Sequence[IOThread],
        name: str = "rng",
        source: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.name = name
        self._source = source
        super().__init__(1, iothreads)

    def handle(self, queue: int, chains: list[Chain]) -> None:
        """Fills each buffer; one that the device may not write is of no use (5.4.6.1)."""
        for chain in chains:
            if wanted := min(chain.writable_len, CHAIN_MOST):
                chain.write(self._source(wanted))
            chain.complete()
