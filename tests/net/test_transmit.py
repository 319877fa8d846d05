"""Frames from a driver on real rings to a tap in a namespace."""

from __future__ import annotations

import os
import random
import threading

import pytest

from tests.frontend.memory import GuestMemory, Region
from tests.frontend.net import (
    GSO_TCPV4,
    HDR_F_NEEDS_CSUM,
    Header,
    NetClient,
)
from tests.frontend.ring import Desc, Used, split

from .frames import GSO, GSO_SIZE, LONG, frame, tcp_frame
from .namespace import Namespace, PacketPort
from .served import Served


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
        Header(HDR_F_NEEDS_CSUM, GSO_TCPV4, 60000, GSO_SIZE, 34, 16),
    ],
    ids=["gso_size 0", "gso_type 7", "csum_start", "csum_offset", "hdr_len"],
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


def test_a_segment_without_a_checksum_to_fill_in(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """Case 63: the kernel looks for the checksum itself, or refuses; nothing else happens."""
    nic.send(tcp_frame(3000), Header(0, GSO_TCPV4, 54, GSO_SIZE))
    sent = frame()
    nic.send(sent)
    seen = []
    while (got := wire.recv()) != sent:
        seen.append(got)
    assert bool(seen) != card.count(1, "drops_refused")


def test_a_header_that_is_rewritten_while_it_is_sent(
    card: Served, nic: NetClient, wire: PacketPort
) -> None:
    """Case 63: csum_start, gso_type and all else may change between any two looks."""
    size = 12 + len(tcp_frame(3000))
    address = nic.memory.alloc(size, 2)
    over = threading.Event()

    def rewrite() -> None:
        noise = random.Random(1)
        while not over.is_set():
            nic.memory.write(address, noise.randbytes(12))

    ring = nic.tx()
    nic.memory.write(address + 12, tcp_frame(3000))
    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(2000):
            head = ring.submit([Desc(address, size)])
            assert ring.wait() == Used(head, 0)
    finally:
        over.set()
        writer.join()
    nic.send(frame())
    assert card.count(1, "breaks") == 0


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


def test_what_was_lost_with_a_server_is_sent_after_all(nic: NetClient, wire: PacketPort) -> None:
    """A front-end whose server died knows only what was made available; the ring knows the rest."""
    before = frame()
    nic.send(before)
    assert wire.recv() == before
    nic.get_vring_base(1)
    lost = [frame(100), frame(200)]
    for one in lost:
        nic.submit(Header().pack() + one)
    nic.start_ring(1, nic.tx(), base=split(nic.tx()).avail_idx)
    for one in lost:
        assert wire.recv() == one
        nic.reap()
