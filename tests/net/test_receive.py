"""Frames from a tap in a namespace to a driver on real rings."""

from __future__ import annotations

import pytest

from tests.frontend.net import (
    F_GUEST_TSO4,
    F_MRG_RXBUF,
    FEATURES,
    GSO_TCPV4,
    HDR_F_NEEDS_CSUM,
    NetClient,
)
from tests.frontend.ring import Desc, Used

from .frames import GSO_SIZE, GUEST, HOST, LONG, frame, long_segment
from .namespace import Namespace, PacketPort
from .served import Served


@pytest.mark.parametrize("payload", [1, 46, 1500])
def test_a_frame_on_the_wire_is_received(nic: NetClient, wire: PacketPort, payload: int) -> None:
    nic.post(4)
    sent = frame(payload, source=HOST, to=GUEST)
    wire.send(sent)
    packet = nic.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == 1


@pytest.mark.parametrize("size", [12, 13, 64, 100, 1526])
def test_a_frame_over_many_merged_buffers(nic: NetClient, wire: PacketPort, size: int) -> None:
    frames = [frame(payload, source=HOST, to=GUEST) for payload in (200, 1, 300, 86)]
    nic.post(60, size)
    for sent in frames:
        wire.send(sent)
    for sent in frames:
        packet = nic.recv()
        assert packet.frame == sent
        assert packet.header.num_buffers == -(-(12 + len(sent)) // size)


@pytest.mark.parametrize("sizes", [[1] * 40, [5, 2000], [11, 1, 2000]], ids=str)
def test_a_receive_buffer_in_pieces(nic: NetClient, wire: PacketPort, sizes: list[int]) -> None:
    nic.post(1, 2048, sizes=[*sizes, 2048 - sum(sizes)])
    sent = frame(500, source=HOST, to=GUEST)
    wire.send(sent)
    packet = nic.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == 1


def test_without_merging_a_frame_has_one_buffer(card: Served, wire: PacketPort) -> None:
    with NetClient(card.path, features=FEATURES & ~F_MRG_RXBUF) as nic:
        nic.post(3, 1526)
        for payload in (1500, 60, 700):
            sent = frame(payload, source=HOST, to=GUEST)
            wire.send(sent)
            packet = nic.recv()
            assert packet.frame == sent
            assert packet.header.num_buffers == 1


def test_a_frame_larger_than_its_only_buffer_is_dropped(card: Served, wire: PacketPort) -> None:
    """Case 65: never a part of a frame; the head comes back with length 0."""
    with NetClient(card.path, features=FEATURES & ~F_MRG_RXBUF) as nic:
        nic.post(2, 500)
        wire.send(frame(1000, source=HOST, to=GUEST))
        assert nic.recv_raw() == b""
        assert card.count(0, "drops_nobuf") == 1
        sent = frame(400, source=HOST, to=GUEST)
        wire.send(sent)
        assert nic.recv().frame == sent


@pytest.mark.parametrize("size", [1, 11])
@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_MRG_RXBUF], ids=["merge", "single"])
def test_a_buffer_smaller_than_the_header_comes_back_empty(
    card: Served, wire: PacketPort, size: int, features: int
) -> None:
    """Case 65."""
    with NetClient(card.path, features=features) as nic:
        nic.post(1, size)
        assert nic.recv_raw() == b""
        assert card.count(0, "drops_short") == 1
        nic.post(1)
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        assert nic.recv().frame == sent


def test_useless_buffers_among_good_ones_do_not_part_a_frame(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """The buffers of a frame follow each other in the used ring; the useless come before."""
    for size in (100, 5, 100, 5, 100, 5, 100):
        nic.post(1, size)
    sent = frame(240, source=HOST, to=GUEST)
    wire.send(sent)
    assert [nic.recv_raw() for _ in range(2)] == [b"", b""]
    packet = nic.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == 3
    sent = frame(50, source=HOST, to=GUEST)
    wire.send(sent)
    assert nic.recv_raw() == b""
    assert nic.recv().frame == sent
    assert card.count(0, "drops_short") == 3


def test_a_readable_receive_buffer_comes_back_empty(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """Case 62."""
    address = nic.memory.alloc(2000, 2)
    ring = nic.rx()
    for chain in (
        [Desc(address, 2000)],
        [Desc(address, 1000), Desc(address + 1000, 1000, write=True)],
    ):
        head = ring.submit(chain)
        assert ring.wait() == Used(head, 0)
    assert card.count(0, "drops_short") == 2
    nic.post(1)
    sent = frame(source=HOST, to=GUEST)
    wire.send(sent)
    assert nic.recv().frame == sent


def test_a_huge_buffer(nic: NetClient, wire: PacketPort) -> None:
    """Case 65."""
    nic.post(2, 1 << 20)
    for payload in (1500, 40):
        sent = frame(payload, source=HOST, to=GUEST)
        wire.send(sent)
        packet = nic.recv()
        assert packet.frame == sent
        assert packet.header.num_buffers == 1


@pytest.mark.parametrize("size", [1526, 4096, 70_000])
def test_a_long_segment_arrives_whole(
    ns: Namespace, card: Served, wire: PacketPort, size: int
) -> None:
    with NetClient(card.path) as nic:
        nic.post(min(60, (3 << 20) // size), size)
        sent = long_segment(ns)
        packet = nic.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == -(-(12 + len(sent)) // size)
    assert (packet.header.gso_type, packet.header.gso_size) == (GSO_TCPV4, GSO_SIZE)
    assert packet.header.flags & HDR_F_NEEDS_CSUM


def test_a_driver_without_tso_gets_segments_cut(
    ns: Namespace, card: Served, wire: PacketPort
) -> None:
    with NetClient(card.path, features=FEATURES & ~F_GUEST_TSO4) as nic:
        nic.post(60, 1600)
        sent = long_segment(ns)
        data = b""
        while len(data) < LONG:
            packet = nic.recv()
            assert packet.header.gso_type == 0
            assert len(packet.frame) <= 54 + GSO_SIZE
            data += packet.frame[54:]
    assert data == sent[54:]


@pytest.mark.parametrize("step", [1, 6, 60])
def test_a_frame_waits_for_buffers_and_loses_nothing(
    ns: Namespace, card: Served, nic: NetClient, wire: PacketPort, step: int
) -> None:
    """A guest that is behind: the rest of a frame goes where it would have gone."""
    nic.post(1, 1526)
    sent = long_segment(ns)
    after = frame(source=HOST, to=GUEST)
    wire.send(after)
    for _ in range(0, 60, step):
        nic.post(step, 1100)
    packet = nic.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == 1 + -(-(12 + len(sent) - 1526) // 1100)
    nic.post(1)
    assert nic.recv().frame == after


def test_a_frame_larger_than_the_whole_ring_is_dropped(
    ns: Namespace, card: Served, wire: PacketPort
) -> None:
    """Case 65: mergeable with too few buffers; all come back empty, none with a part."""
    with NetClient(card.path, size=8) as nic:
        nic.post(8, 1526)
        long_segment(ns)
        assert [nic.recv_raw() for _ in range(8)] == [b""] * 8
        assert card.count(0, "drops_nobuf") == 1
        nic.post(1)
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        assert nic.recv().frame == sent


def test_a_full_receive_ring_goes_on_when_it_gets_buffers(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """Case 65: frames wait in the tap's own queue, in order."""
    frames = [frame(100, source=HOST, to=GUEST) for _ in range(40)]
    nic.post(2)
    for sent in frames:
        wire.send(sent)
    got = [nic.recv().frame for _ in range(2)]
    for _ in range(38):
        nic.post(1)
        got.append(nic.recv().frame)
    assert got == frames
