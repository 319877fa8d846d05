"""Frames that their sender left unfinished: passed on, or finished for a driver that cannot."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import pytest

from tests.frontend.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_MRG_RXBUF,
    FEATURES,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    HDR_F_DATA_VALID,
    HDR_F_NEEDS_CSUM,
    Header,
)

from .frames import GSO, GSO_SIZE, GUEST, HOST, tcp_frame
from .switched import Plug, Switched, mac, nothing_for, to

NOTHING = FEATURES & ~(F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN)
CHECKSUMS = NOTHING | F_GUEST_CSUM
PLAIN = Header(num_buffers=1)
FIN, PSH, ACK, CWR = 1, 8, 16, 128


def ones_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(frame: bytes, length: int) -> int:
    addresses = frame[26:34] if frame[12:14] == b"\x08\0" else frame[22:54]
    return ones_sum(addresses + struct.pack(">II", 6, length))


def tcp6_frame(payload: int, flags: int = ACK) -> bytes:
    """As `tcp_frame`, over IPv6."""
    ip = struct.pack(">IHBB", 6 << 28, 20 + payload, 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 0xFFFFFF00, 1, 0x50, flags, 512, 0, 0)
    return HOST + GUEST + b"\x86\xdd" + ip + tcp + os.urandom(payload)


def started(frame: bytes, tcp: int) -> bytes:
    """With the pseudo header's sum in the checksum's place, as senders leave it."""
    value = pseudo_sum(frame, len(frame) - tcp)
    return frame[: tcp + 16] + value.to_bytes(2, "big") + frame[tcp + 18 :]


def is_whole(frame: bytes, tcp: int) -> bool:
    """Whether its TCP checksum is right, and of IPv4 the header's too."""
    if frame[12:14] == b"\x08\0" and ones_sum(frame[14:34]) != 0xFFFF:
        return False
    total = pseudo_sum(frame, len(frame) - tcp) + ones_sum(frame[tcp:])
    return (total & 0xFFFF) + (total >> 16) == 0xFFFF


@pytest.mark.parametrize("payload", [1, 100, 1001])
def test_a_checksum_is_completed_for_who_cannot(sw: Switched, plug: Plug, payload: int) -> None:
    a, b, c = plug("a"), plug("b", features=NOTHING), plug("c", features=CHECKSUMS)
    sent = started(tcp_frame(payload), 34)
    header = Header(HDR_F_NEEDS_CSUM, GSO_NONE, 0, 0, 34, 16)
    a.send(sent, header)
    packet = b.recv()
    assert packet.header == PLAIN
    assert is_whole(packet.frame, 34)
    assert packet.frame[:50] + packet.frame[52:] == sent[:50] + sent[52:]
    assert c.recv().frame == sent
    assert sw.count("b", "finished") == 1
    assert sw.count("c", "finished") == 0


def test_who_can_gets_a_segment_as_it_is(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b", buffers=50)
    sent = tcp_frame(65000)
    a.send(sent, GSO)
    packet = b.recv()
    assert packet.frame == sent
    assert packet.header == replace(GSO, num_buffers=-(-(12 + len(sent)) // 2048))


@pytest.mark.parametrize("features", [NOTHING, CHECKSUMS], ids=["nothing", "checksums"])
@pytest.mark.parametrize("payload", [GSO_SIZE + 1, 3 * GSO_SIZE, 30_000, 65_000])
@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_is_cut_for_who_cannot(
    sw: Switched, plug: Plug, features: int, payload: int, version: int
) -> None:
    a, b = plug("a"), plug("b", buffers=60, features=features & ~F_MRG_RXBUF)
    sent, tcp = (tcp_frame(payload), 34) if version == 4 else (tcp6_frame(payload), 54)
    flags = FIN | PSH | ACK | CWR
    sent = started(sent[: tcp + 13] + bytes([flags]) + sent[tcp + 14 :], tcp)
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    a.send(sent, Header(HDR_F_NEEDS_CSUM, kind, tcp + 20, GSO_SIZE, tcp, 16))
    count = -(-payload // GSO_SIZE)
    got = b""
    first = int.from_bytes(sent[tcp + 4 : tcp + 8], "big")
    for number in range(count):
        packet = b.recv()
        frame = packet.frame
        assert packet.header == PLAIN
        assert is_whole(frame, tcp)
        assert frame[:14] == sent[:14]
        if version == 4:
            assert int.from_bytes(frame[16:18], "big") == len(frame) - 14
            assert int.from_bytes(frame[18:20], "big") == 1 + number
        else:
            assert int.from_bytes(frame[18:20], "big") == len(frame) - 54
        sequence = int.from_bytes(frame[tcp + 4 : tcp + 8], "big")
        assert sequence == (first + number * GSO_SIZE) & 0xFFFFFFFF
        want = ACK
        want |= CWR if number == 0 else 0
        want |= FIN | PSH if number == count - 1 else 0
        assert frame[tcp + 13] == want
        got += frame[tcp + 20 :]
    assert got == sent[tcp + 20 :]
    nothing_for(sw, b)
    assert sw.count("b", "finished") == sw.count("b", "out_frames") == count


def test_a_segment_that_is_none_is_not_cut(sw: Switched, plug: Plug) -> None:
    """Its header says what its bytes do not: who takes it whole may find out, others get none."""
    a, b = plug("a"), plug("b", buffers=60, features=NOTHING)
    good = tcp_frame(3000)
    for frame, header in (
        (good, replace(GSO, gso_type=GSO_TCPV6)),
        (good, replace(GSO, csum_start=38)),
        (good, replace(GSO, csum_offset=6)),
        (good[:14] + b"\x46" + good[15:], GSO),
        (good[:14] + b"\x65" + good[15:], GSO),
        (good[:23] + b"\x11" + good[24:], GSO),
        (good[:46] + b"\x40" + good[47:], GSO),
        (good[:46] + b"\xf0" + good[47:94], GSO),
        (good[:54], GSO),
        (good, replace(GSO, gso_size=23)),
    ):
        a.send(frame, header)
    assert sw.count("b", "drop_unfinished") == 10
    nothing_for(sw, b)


@pytest.mark.parametrize(
    "header",
    [
        Header(0, GSO_TCPV4, 54, GSO_SIZE, 34, 16),
        replace(GSO, gso_size=0),
        replace(GSO, gso_type=GSO_UDP),
        replace(GSO, gso_type=2),
        replace(GSO, gso_type=GSO_ECN),
        replace(GSO, hdr_len=0xFFFF),
        replace(GSO, csum_start=3040),
        replace(GSO, csum_start=0xFFFF, csum_offset=0xFFFF),
        replace(GSO, csum_offset=3020),
        replace(GSO, csum_start=13),
    ],
    ids=str,
)
def test_a_header_that_cannot_be(sw: Switched, plug: Plug, header: Header) -> None:
    a, b, c = plug("a"), plug("b"), plug("c", features=NOTHING)
    a.send(tcp_frame(3000), header)
    assert sw.count("a", "drop_bad_header") == 1
    nothing_for(sw, b, c)


@pytest.mark.parametrize(("start", "passes"), [(65531, True), (65532, False)])
def test_a_checksum_that_begins_at_the_end_of_all_numbers(
    sw: Switched, plug: Plug, start: int, passes: bool
) -> None:
    """Behind a tag it would begin at the frame's start."""
    a, b = plug("a"), plug("b", buffers=60)
    a.send(to(1, 2, 65570), Header(HDR_F_NEEDS_CSUM, GSO_NONE, 0, 0, start, 2))
    assert sw.count("a", "drop_bad_header") == (0 if passes else 1)
    if passes:
        assert b.recv().header.csum_start == start
    nothing_for(sw, b)


@pytest.mark.parametrize(
    ("lacks", "header"),
    [
        (F_CSUM, replace(GSO, gso_type=GSO_NONE)),
        (F_HOST_TSO4, GSO),
        (F_HOST_TSO6, replace(GSO, gso_type=GSO_TCPV6)),
        (F_HOST_ECN, replace(GSO, gso_type=GSO_TCPV4 | GSO_ECN)),
    ],
)
def test_what_was_not_agreed_on_is_not_left_undone(
    sw: Switched, plug: Plug, lacks: int, header: Header
) -> None:
    a, b = plug("a", features=FEATURES & ~lacks), plug("b")
    a.send(tcp_frame(3000), header)
    assert sw.count("a", "drop_bad_header") == 1
    nothing_for(sw, b)


def test_nobody_vouches_for_his_own_checksums(sw: Switched, plug: Plug) -> None:
    """DATA_VALID is for receivers: from a guest it means nothing, and others do not get it."""
    a, b = plug("a"), plug("b")
    sent = to(1, 2)
    a.send(sent, Header(HDR_F_DATA_VALID, 0, 7, 7, 7, 7, 7))
    packet = b.recv()
    assert packet.frame == sent
    assert packet.header == PLAIN


def test_a_frame_of_another_driver_between(sw: Switched, plug: Plug) -> None:
    """What one receiver needs does not change what the next one gets."""
    a, b, c = plug("a"), plug("b", buffers=50, features=NOTHING), plug("c", buffers=50)
    sent = started(tcp_frame(5000), 34)
    sent = b"\xff" * 6 + mac(1) + sent[12:]
    a.send(sent, GSO)
    assert c.recv().frame == sent
    assert b"".join(b.recv().frame[54:] for _ in range(4)) == sent[54:]
