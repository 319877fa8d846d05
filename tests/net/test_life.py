"""Rings that stop, start and change under traffic; drivers in turn; several queue pairs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.frontend.memory import GuestMemory, Region
from tests.frontend.net import (
    F_MRG_RXBUF,
    FEATURES,
    NetClient,
)
from tests.frontend.ring import Desc, split
from tests.frontend.session import F_EVENT_IDX, Session

from .frames import GUEST, HOST, frame, long_segment
from .namespace import Namespace, PacketPort
from .served import Served


def test_a_disabled_ring_receives_nothing_until_it_is_enabled(
    card: Served, wire: PacketPort
) -> None:
    with NetClient(card.path, enable=False) as nic:
        nic.post(4)
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        nic.barrier()
        assert split(nic.rx()).used_idx == 0
        nic.enable(0)
        assert nic.recv().frame == sent
        nic.enable(0, False)
        again = frame(source=HOST, to=GUEST)
        wire.send(again)
        nic.barrier()
        assert split(nic.rx()).used_idx == 1
        nic.enable(0)
        assert nic.recv().frame == again


def test_a_stopped_ring_gives_back_what_it_looked_at(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    nic.post(10)
    for count in itertools.count(1):
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        assert nic.recv().frame == sent
        base = nic.get_vring_base(0)
        assert base == split(nic.rx()).used_idx == count
        if count == 5:
            break
        nic.start_ring(0, nic.rx(), base=base)


def test_a_held_frame_does_not_outlive_its_ring(
    ns: Namespace, card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """It is dropped whole, if it was taken from the tap by then; what is behind it comes next."""
    nic.post(3, 1526)
    sent = long_segment(ns)
    after = frame(source=HOST, to=GUEST)
    wire.send(after)
    assert nic.get_vring_base(0) == 0
    assert split(nic.rx()).used_idx == 0
    expected = [after] if card.count(0, "drops_nobuf") else [sent, after]
    nic.start_ring(0, nic.rx())
    nic.post(45, 1526)
    for data in expected:
        assert nic.recv().frame == data


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_EVENT_IDX], ids=["event", "flags"])
def test_kicks_are_asked_for_when_buffers_are_short(
    card: Served, wire: PacketPort, features: int
) -> None:
    """A driver that kicks only when it is asked to (virtio 1.3, 2.7.10) is never left waiting."""
    with NetClient(card.path, features=features) as nic:
        ring = split(nic.rx())
        sent = [frame(source=HOST, to=GUEST) for _ in range(100)]
        for data in sent:
            wire.send(data)
        for data in sent:
            address = nic.memory.alloc(2048, 2)
            head = ring.add([Desc(address, 2048, write=True)])
            before = ring.avail_idx
            ring.offer(head)
            if ring.wants_kick(before, ring.avail_idx):
                ring.kick()
            used = ring.wait()
            assert nic.memory.read(address, used.len)[12:] == data
            nic.memory.release(address, 2048)


def test_memory_may_change_while_buffers_wait(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    nic.post(10)
    for _ in range(3):
        nic.share(nic.memory)
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        assert nic.recv().frame == sent


def test_both_directions_through_a_wrapping_ring(card: Served, wire: PacketPort) -> None:
    """Indexes pass 65535."""
    with NetClient(card.path, size=16) as nic:
        for index, ring in enumerate(nic.rings):
            nic.get_vring_base(index)
            ring.reset(65530)
            nic.start_ring(index, ring, base=65530)
        nic.post(8)
        for _ in range(40):
            out, back = frame(), frame(source=HOST, to=GUEST)
            nic.send(out)
            wire.send(back)
            assert wire.recv() == out
            assert nic.recv().frame == back
            nic.post(1)


def test_one_driver_after_another(card: Served, wire: PacketPort) -> None:
    for features in (FEATURES, FEATURES & ~F_MRG_RXBUF, FEATURES):
        with NetClient(card.path, features=features) as nic:
            nic.post(4)
            out, back = frame(), frame(source=HOST, to=GUEST)
            nic.send(out)
            wire.send(back)
            assert wire.recv() == out
            assert nic.recv().frame == back


def test_the_file_behind_the_buffers_is_truncated(card: Served, wire: PacketPort) -> None:
    """Case 12: the frame's memory is gone; that ring breaks, and the next driver is served."""
    memory = GuestMemory.default()
    spare = memory.add(Region(1 << 40, 1 << 20))
    with NetClient(card.path, memory=memory) as nic:
        spare.truncate(0)
        nic.tx().submit([Desc((1 << 40) + 4096, 200)])
        nic.tx().wait_broken()
        nic.rx().submit([Desc((1 << 40) + 4096, 2048, write=True)])
        wire.send(frame(source=HOST, to=GUEST))
        nic.rx().wait_broken()
    assert card.count(0, "breaks") == card.count(1, "breaks") == 1
    test_one_driver_after_another(card, wire)


def test_a_tap_deleted_under_its_server(ns: Namespace, card: Served, nic: NetClient) -> None:
    """The cable is gone for good, but rings and drivers go on."""
    nic.post(4)
    ns.ip("link del tap0")
    nic.send(frame())
    assert card.count(1, "drops_refused") == 1
    assert nic.get_vring_base(0) == 0
    nic.close()
    with Session(card.path) as probe:
        assert probe.get_features()


def test_queue_pairs(ns: Namespace, tmp_path: Path) -> None:
    pairs = 4
    with (
        Served(ns, tmp_path / "s", tap="tap0", queues=pairs, iothreads=2) as card,
        ns.port("tap0") as wire,
        NetClient(card.path, pairs=pairs, memory=GuestMemory.default(16 << 20)) as nic,
    ):
        assert nic.config().max_pairs == pairs
        for pair in range(pairs):
            nic.post(40, pair=pair)
            out = frame()
            nic.send(out, pair=pair)
            assert wire.recv() == out
        # The kernel chooses a queue by flow; only those whose ring is enabled are chosen.
        for _ in range(40):
            wire.send(frame(source=b"\x02" + os.urandom(5), to=GUEST))
        for pair in range(1, pairs):
            nic.enable(2 * pair, False)
        before = sum(split(nic.rx(pair)).used_idx for pair in range(1, pairs))
        for _ in range(20):
            wire.send(frame(source=HOST, to=GUEST))
        nic.barrier()
        assert sum(split(nic.rx(pair)).used_idx for pair in range(1, pairs)) == before
