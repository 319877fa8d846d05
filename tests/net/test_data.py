"""Frames between a tap in a namespace and a driver on real rings."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.memory import GuestMemory, Region
from tests.frontend.net import (
    F_GUEST_TSO4,
    F_MRG_RXBUF,
    FEATURES,
    GSO_TCPV4,
    HDR_F_NEEDS_CSUM,
    Header,
    NetClient,
)
from tests.frontend.ring import Desc, Used
from tests.frontend.session import F_EVENT_IDX, Session

from .namespace import TEST_TYPE, Namespace, PacketPort
from .served import LOOPS, Served

GUEST = bytes.fromhex("020000000001")
HOST = bytes.fromhex("020000000002")
LONG = 65000
GSO_SIZE = 1448


def frame(payload: int = 100, *, source: bytes = GUEST, to: bytes = HOST) -> bytes:
    """An Ethernet frame of 14 + `payload` bytes, all different."""
    return to + source + TEST_TYPE.to_bytes(2, "big") + os.urandom(payload)


def tcp_frame(payload: int) -> bytes:
    """A TCP segment over IPv4, `payload` bytes long, whose checksum is still to be made."""
    total = 40 + payload
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    words = sum(struct.unpack(">10H", ip))
    words = (words & 0xFFFF) + (words >> 16)
    ip = ip[:10] + (~words & 0xFFFF).to_bytes(2, "big") + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 512, 0, 0)
    return b"".join((HOST, GUEST, b"\x08\x00", ip, tcp, os.urandom(payload)))


GSO = Header(HDR_F_NEEDS_CSUM, GSO_TCPV4, 54, GSO_SIZE, 34, 16)


@pytest.fixture(params=LOOPS)
def card(ns: Namespace, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with Served(ns, tmp_path / "s", tap="tap0", loop=request.param) as served:
        yield served


@pytest.fixture
def wire(ns: Namespace, card: Served) -> Iterator[PacketPort]:
    """The host's end of the card's tap."""
    with ns.port("tap0") as port:
        yield port


@pytest.fixture
def nic(card: Served) -> Iterator[NetClient]:
    with NetClient(card.path) as client:
        yield client


# ---- transmit ----


@pytest.mark.parametrize("payload", [1, 46, 1500, LONG])
def test_a_frame_sent_is_the_frame_on_the_wire(
    nic: NetClient, wire: PacketPort, payload: int
) -> None:
    sent = frame(payload)
    nic.send(sent)
    assert wire.recv() == sent


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    "sizes", [[1] * 12, [5, 7], [12, 14], [1] * 40], ids=["1x12", "5+7", "12+14", "1x40"]
)
def test_any_framing_of_a_sent_frame_is_legal(
    nic: NetClient, wire: PacketPort, sizes: list[int], indirect: bool
) -> None:
    """Case 62: the header over 12 descriptors (virtio 1.3, 2.7.4, ANY_LAYOUT)."""
    sent = frame()
    nic.send(sent, sizes=[*sizes, 12 + len(sent) - sum(sizes)], indirect=indirect)
    assert wire.recv() == sent


def test_a_chain_of_more_pieces_than_writev_takes(card: Served, wire: PacketPort) -> None:
    with NetClient(card.path, size=2048) as nic:
        sent = frame(2000)
        nic.send(sent, sizes=[1] * (12 + len(sent)))
        assert wire.recv() == sent


def test_a_buffer_over_two_regions(card: Served, wire: PacketPort) -> None:
    """Case 46."""
    size = 1 << 20
    memory = GuestMemory(Region(0, size), Region(size, size))
    with NetClient(card.path, memory=memory) as nic:
        sent = frame()
        data = Header().pack() + sent
        memory.write(size - 20, data)
        ring = nic.tx()
        head = ring.submit([Desc(size - 20, len(data))])
        assert ring.wait() == Used(head, 0)
        assert wire.recv() == sent


def test_a_batch_of_frames_stays_in_order(card: Served, wire: PacketPort) -> None:
    with NetClient(card.path, size=256) as nic:
        frames = [frame(200) for _ in range(200)]
        ring = nic.tx()
        heads = []
        for data in frames:
            address = nic.memory.alloc(12 + len(data), 2)
            nic.memory.write(address, Header().pack() + data)
            heads.append(ring.add([Desc(address, 12 + len(data))]))
        ring.offer(*heads)
        ring.kick()
        assert [ring.wait() for _ in heads] == [Used(head, 0) for head in heads]
        assert wire.recv_many(200) == frames
    assert card.count(1, "packets") == 200
    assert card.count(1, "bytes_written") == sum(map(len, frames))


def test_a_long_segment_leaves_whole(ns: Namespace, card: Served, nic: NetClient) -> None:
    with ns.port("tap0", vnet_header=True) as wire:
        sent = tcp_frame(60 * 1000)
        nic.send(sent, GSO)
        got = wire.recv()
    assert got[10:] == sent
    assert (got[1], int.from_bytes(got[4:6], "little")) == (GSO_TCPV4, GSO_SIZE)


@pytest.mark.parametrize("length", [1, 11, 12])
def test_a_chain_not_longer_than_the_header_is_dropped(
    card: Served, nic: NetClient, wire: PacketPort, length: int
) -> None:
    """Case 62, and a frame of 0 bytes (64)."""
    head = nic.submit(bytes(length))
    assert nic.reap() == Used(head, 0)
    assert card.count(1, "drops_short") == 1
    sent = frame()
    nic.send(sent)
    assert wire.recv() == sent


def test_a_sent_chain_with_a_writable_part_is_dropped(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """Case 62."""
    address = nic.memory.alloc(200, 2)
    ring = nic.tx()
    head = ring.submit([Desc(address, 100), Desc(address + 100, 100, write=True)])
    assert ring.wait() == Used(head, 0)
    assert card.count(1, "drops_short") == 1
    sent = frame()
    nic.send(sent)
    assert wire.recv() == sent


@pytest.mark.parametrize(
    "header",
    [
        Header(HDR_F_NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16),
        Header(HDR_F_NEEDS_CSUM, 7, 54, GSO_SIZE, 34, 16),
        Header(HDR_F_NEEDS_CSUM, 0, 0, 0, 60000, 16),
        Header(HDR_F_NEEDS_CSUM, 0, 0, 0, 34, 60000),
    ],
    ids=["gso_size 0", "gso_type 7", "csum_start", "csum_offset"],
)
def test_a_header_that_lies_is_refused(
    card: Served, nic: NetClient, wire: PacketPort, header: Header
) -> None:
    """Case 63: the kernel checks its own copy of the header."""
    nic.send(tcp_frame(3000), header)
    assert card.count(1, "drops_refused") == 1
    sent = frame()
    nic.send(sent)
    assert wire.recv() == sent


@pytest.mark.parametrize("length", [1, 13, 66_000, 200_000])
def test_a_frame_that_ethernet_has_not_is_refused(
    card: Served, nic: NetClient, wire: PacketPort, length: int
) -> None:
    """Case 64."""
    nic.send(os.urandom(length))
    assert card.count(1, "drops_refused") == 1
    sent = frame()
    nic.send(sent)
    assert wire.recv() == sent


def test_what_a_disabled_ring_sends_is_dropped(card: Served, wire: PacketPort) -> None:
    """Case 64; vhost-user, "Ring states"."""
    with NetClient(card.path, enable=False) as nic:
        nic.send(frame())
        assert card.count(1, "drops_disabled") == 1
        nic.enable(1)
        sent = frame()
        nic.send(sent)
        assert wire.recv() == sent


# ---- receive ----


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


def long_segment(ns: Namespace) -> bytes:
    """A segment of 64 KiB towards the guest."""
    sent = tcp_frame(LONG)
    with ns.port("tap0", vnet_header=True) as wire:
        wire.send(GSO.pack()[:10] + sent)
    return sent


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


def test_a_disabled_ring_receives_nothing_until_it_is_enabled(
    card: Served, wire: PacketPort
) -> None:
    with NetClient(card.path, enable=False) as nic:
        nic.post(4)
        sent = frame(source=HOST, to=GUEST)
        wire.send(sent)
        nic.barrier()
        assert nic.rx().used_idx == 0
        nic.enable(0)
        assert nic.recv().frame == sent
        nic.enable(0, False)
        again = frame(source=HOST, to=GUEST)
        wire.send(again)
        nic.barrier()
        assert nic.rx().used_idx == 1
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
        assert base == nic.rx().used_idx == count
        if count == 5:
            break
        nic.start_ring(0, nic.rx(), base=base)


def test_a_held_frame_does_not_outlive_its_ring(
    ns: Namespace, card: Served, nic: NetClient, wire: PacketPort
) -> None:
    nic.post(3, 1526)
    long_segment(ns)
    wire.send(frame(source=HOST, to=GUEST))
    nic.barrier()
    assert nic.get_vring_base(0) == 0
    assert nic.rx().used_idx == 0
    nic.start_ring(0, nic.rx())
    nic.post(3, 1526)
    sent = nic.recv().frame
    assert sent[12:14] == TEST_TYPE.to_bytes(2, "big") or len(sent) == 54 + LONG


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_EVENT_IDX], ids=["event", "flags"])
def test_kicks_are_asked_for_when_buffers_are_short(
    card: Served, wire: PacketPort, features: int
) -> None:
    """A driver that kicks only when it is asked to (virtio 1.3, 2.7.10) is never left waiting."""
    with NetClient(card.path, features=features) as nic:
        ring = nic.rx()
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


# ---- one client after another, several queues ----


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
        before = sum(nic.rx(pair).used_idx for pair in range(1, pairs))
        for _ in range(20):
            wire.send(frame(source=HOST, to=GUEST))
        nic.barrier()
        assert sum(nic.rx(pair).used_idx for pair in range(1, pairs)) == before
