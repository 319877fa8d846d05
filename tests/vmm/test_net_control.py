"""A card of several pairs: the control queue decides which of them run."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.vmm.served import Served, threads
from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import GuestMemory
from vdev.virtio.device import Device
from vdev.virtio.queue import Queue, QueueConfig
from vdev.virtio.spec import RING_FEATURES
from vdev.vmm.devices.net_control import ControlledNic

PAIRS = 3


class FakeQueue(Queue):
    def __init__(self, config: QueueConfig) -> None:
        self.enabled = config.enabled

    async def stop(self) -> int:
        return 0

    async def set_call(self, fd: int) -> None: ...
    async def set_err(self, fd: int) -> None: ...
    async def set_kick(self, fd: int) -> None: ...
    async def set_memory(self, memory: GuestMemory) -> None: ...

    async def set_enabled(self, enabled: bool) -> None:
        self.enabled = enabled


class Card(Device):
    """Remembers what it is told."""

    name = "card"
    device_id = lib.VIRTIO_ID_NET
    num_queues = 2 * PAIRS
    features = RING_FEATURES | 1 << lib.VIRTIO_NET_F_MQ | 1 << lib.VIRTIO_NET_F_CTRL_VQ

    def __init__(self) -> None:
        super().__init__()
        self.iothreads = threads()
        self.queues: dict[int, FakeQueue] = {}
        self.told: list[tuple[int, bool]] = []
        self.links: list[bool] = []

    def config(self) -> bytes:
        return b"config"

    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> Queue:
        self.queues[config.index] = FakeQueue(config)
        return self.queues[config.index]

    def queue_enabled(self, index: int, enabled: bool) -> None:
        self.told.append((index, enabled))

    def set_link(self, up: bool) -> None:
        self.links.append(up)

    def reset(self) -> None: ...
    def close(self) -> None: ...


async def started() -> tuple[Card, ControlledNic]:
    card = Card()
    nic = ControlledNic(card, card.iothreads)
    for index in range(card.num_queues):
        await nic.start_queue(QueueConfig(index, 8, 0, 0, 0, 0), GuestMemory(()))
    return card, nic


def running(card: Card) -> list[int]:
    return [index for index, queue in card.queues.items() if queue.enabled]


async def test_it_starts_with_one_pair_and_a_queue_more() -> None:
    card, nic = await started()
    assert nic.num_queues == card.num_queues + 1
    assert (nic.features, nic.config()) == (card.features, b"config")
    assert running(card) == [0, 1]
    assert card.told == [(0, True), (1, True)]
    nic.close()


async def test_the_cable_is_the_cards() -> None:
    card, nic = await started()
    nic.set_link(False)
    nic.set_link(True)
    assert card.links == [False, True]
    nic.close()


async def test_what_takes_other_commands_is_not_offered() -> None:
    card = Card()
    card.features |= 1 << lib.VIRTIO_NET_F_CTRL_MAC_ADDR | 1 << lib.VIRTIO_NET_F_RSS
    nic = ControlledNic(card, card.iothreads)
    assert nic.features == Card.features
    nic.close()


@pytest.mark.parametrize(
    ("command", "answer", "left"),
    [
        (struct.pack("<BBH", 4, 0, 3), lib.VIRTIO_NET_OK, [0, 1, 2, 3, 4, 5]),
        (struct.pack("<BBH", 4, 0, 2) + b"more", lib.VIRTIO_NET_OK, [0, 1, 2, 3]),
        (struct.pack("<BBH", 4, 0, 0), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 4, 0, PAIRS + 1), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 4, 1, 2), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 0, 0, 2), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 4, 0, 0x8001), lib.VIRTIO_NET_ERR, [0, 1]),
        (b"\x04\x00\x02", lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 255, 255, 2), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBB", 0, 0, 1), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBI", 1, 0, 0xFFFFFFFF), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBH", 2, 0, 4096), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBQ", 5, 0, 1 << 7), lib.VIRTIO_NET_ERR, [0, 1]),
        (struct.pack("<BBIHH", 4, 1, 0x3F, 2, 3), lib.VIRTIO_NET_ERR, [0, 1]),
    ],
    ids=[
        *("all", "two", "none", "too many", "another verb", "another class", "0x8001"),
        *("cut short", "unknown", "promiscuous", "a MAC table that overflows"),
        *("VLAN 4096", "offloads", "an RSS table of three"),
    ],
)
async def test_commands(command: bytes, answer: int, left: list[int]) -> None:
    """Case 66: what was not offered is refused like what does not exist."""
    card, nic = await started()
    async with Served(nic._control) as served:
        room = served.room(1)
        assert await served.request(0, served.data(command), room) == 1
        assert served.content(room) == bytes([answer])
        assert running(card) == left


async def test_a_command_that_nobody_can_answer() -> None:
    """Case 66: without a writable byte for the ack, or without a command; the queue goes on."""
    _, nic = await started()
    async with Served(nic._control) as served:
        pairs = struct.pack("<BBH", 4, 0, 2)
        assert await served.request(0, served.data(pairs)) == 0
        assert await served.request(0, served.data(pairs + b"\0")) == 0
        room = served.room(1)
        assert await served.request(0, served.data(pairs), room) == 1
        assert served.content(room) == bytes([lib.VIRTIO_NET_OK])
        assert await served.request(0, room) == 1
        assert served.content(room) == bytes([lib.VIRTIO_NET_ERR])


async def test_fewer_again_and_reset() -> None:
    card, nic = await started()
    assert await nic.set_pairs(3)
    assert await nic.set_pairs(1)
    assert running(card) == [0, 1]
    assert card.told[-4:] == [(2, False), (3, False), (4, False), (5, False)]
    await nic.set_pairs(2)
    assert nic.save() == {"pairs": 2}
    nic.reset()
    assert nic.save() == {"pairs": 1}
    nic.restore({"pairs": 3})
    assert nic.describe()["pairs"] == 3
    for bad in ({"pairs": 0}, {"pairs": 4}, {"pairs": "2"}, {}):
        with pytest.raises(ValueError, match="queue pairs"):
            nic.restore(bad)
    with pytest.raises(PeerError):
        nic.write_config(0, b"x")
    nic.close()
