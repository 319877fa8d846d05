"""A network card of several queue pairs, with the control queue that a VMM serves for it.

Of the control commands (virtio 1.3, section 5.1.6.5) it knows the one that such a card needs: how
many pairs the driver uses. Until then it is one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vdev._native import lib
from vdev.iothread import IOThread
from vdev.memory import GuestMemory
from vdev.virtio.batch import BatchDevice, Chain
from vdev.virtio.device import Device
from vdev.virtio.queue import Queue, QueueConfig

_COMMAND = struct.Struct("<BBH")
_UNKNOWN = sum(
    1 << feature
    for feature in (
        lib.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        lib.VIRTIO_NET_F_CTRL_RX,
        lib.VIRTIO_NET_F_CTRL_VLAN,
        lib.VIRTIO_NET_F_CTRL_RX_EXTRA,
        lib.VIRTIO_NET_F_GUEST_ANNOUNCE,
        lib.VIRTIO_NET_F_CTRL_MAC_ADDR,
        lib.VIRTIO_NET_F_HASH_REPORT,
        lib.VIRTIO_NET_F_RSS,
    )
)
"""What some back-ends offer, and other commands than ours are for."""


class ControlledNic(Device):
    """`card`, whose queues are pairs, and behind them the control queue, on one of `iothreads`."""

    device_id = lib.VIRTIO_ID_NET

    def __init__(self, card: Device, iothreads: Sequence[IOThread]) -> None:
        super().__init__()
        self.name = card.name
        self.num_queues = card.num_queues + 1
        self.features = card.features & ~_UNKNOWN
        self.supports_log = card.supports_log
        self._card = card
        self._pairs = 1
        self._queues: dict[int, Queue] = {}
        self._control = _Control(self, iothreads)
        self.config_changed = card.config_changed

    def config(self) -> bytes:
        return self._card.config()

    def write_config(self, offset: int, data: bytes) -> None:
        self._card.write_config(offset, data)

    def negotiate(self, features: int) -> None:
        self._card.negotiate(features)

    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> Queue:
        if config.index == self._card.num_queues:
            return await self._control.start_queue(replace(config, index=0), memory, on_broken)
        enabled = config.index // 2 < self._pairs
        if enabled:
            self._card.queue_enabled(config.index, True)
        queue = await self._card.start_queue(replace(config, enabled=enabled), memory, on_broken)
        self._queues[config.index] = queue
        return queue

    async def set_pairs(self, pairs: int) -> bool:
        """The driver uses so many; returns whether it can."""
        if not 1 <= pairs <= self._card.num_queues // 2:
            return False
        for index, queue in self._queues.items():
            enabled = index // 2 < pairs
            if enabled != (index // 2 < self._pairs):
                await queue.set_enabled(enabled)
                self._card.queue_enabled(index, enabled)
        self._pairs = pairs
        return True

    def reset(self) -> None:
        self._pairs = 1
        self._queues.clear()
        self._card.reset()

    def release(self) -> None:
        self._pairs = 1
        self._queues.clear()
        self._card.release()

    def save(self) -> dict[str, Any]:
        return {"pairs": self._pairs}

    def restore(self, state: dict[str, Any]) -> None:
        pairs = state.get("pairs")
        if not isinstance(pairs, int) or not 1 <= pairs <= self._card.num_queues // 2:
            raise ValueError(f"{self.name}: {pairs!r} queue pairs")
        self._pairs = pairs

    def set_link(self, up: bool) -> None:
        self._card.set_link(up)

    def describe(self) -> dict[str, Any]:
        return {**self._card.describe(), "pairs": self._pairs}

    def stats(self) -> dict[str, Any]:
        return self._card.stats()

    def close(self) -> None:
        """The card stays its owner's to close."""
        self._control.close()


class _Control(BatchDevice):
    """The control queue."""

    device_id = lib.VIRTIO_ID_NET

    def __init__(self, nic: ControlledNic, iothreads: Sequence[IOThread]) -> None:
        self.name = f"{nic.name} control"
        self._nic = nic
        super().__init__(1, iothreads)

    async def handle(self, queue: int, chains: list[Chain]) -> None:
        for chain in chains:
            chain.write(
                bytes([lib.VIRTIO_NET_OK if await self._obey(chain) else lib.VIRTIO_NET_ERR])
            )
            chain.complete()

    async def _obey(self, chain: Chain) -> bool:
        command = chain.read(_COMMAND.size)
        if len(command) < _COMMAND.size:
            return False
        kind, verb, pairs = _COMMAND.unpack(command)
        if (kind, verb) != (lib.VIRTIO_NET_CTRL_MQ, lib.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET):
            return False
        return await self._nic.set_pairs(pairs)
