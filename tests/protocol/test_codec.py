"""Framing: every message whole, byte by byte, and with the next one behind it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.messages import BODIES
from vdev._native import lib
from vdev.errors import PeerError
from vdev.virtio.vhost_user.codec import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    Decoder,
    Message,
    encode,
)
from vdev.virtio.vhost_user.payloads import (
    CONFIG,
    INFLIGHT,
    IOTLB,
    MEMORY_TABLE,
    SINGLE_REGION,
    U64,
    VRING_ADDR,
    VRING_STATE,
    ConfigAccess,
    Format,
    Inflight,
    MemoryRegion,
    VringAddr,
    VringState,
)
from vdev.virtio.vhost_user.table import ROWS, Row

EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
FDS = [7, 8]


def sample(row: Row) -> bytes:
    return encode(row.request, row.payload.encode(BODIES[row.payload]), NEED_REPLY)


def decode_whole(data: bytes) -> Message:
    decoder = Decoder()
    decoder.feed(data, FDS)
    message = decoder.next_message()
    assert message is not None
    decoder.end()
    return message


def check(message: Message | None, row: Row) -> None:
    assert message is not None
    assert message.request == row.request
    assert message.need_reply
    assert message.fds == FDS
    assert row.payload.decode(message.payload) == BODIES[row.payload]


@EVERY
def test_whole(row: Row) -> None:
    check(decode_whole(sample(row)), row)


@EVERY
def test_byte_by_byte(row: Row) -> None:
    decoder = Decoder()
    data = sample(row)
    for at in range(len(data)):
        assert decoder.next_message() is None
        assert 0 < decoder.wanted <= len(data) - at
        decoder.feed(data[at : at + 1], FDS if at == 0 else ())
    check(decoder.next_message(), row)


@EVERY
def test_with_trailing_bytes(row: Row) -> None:
    decoder = Decoder()
    data = sample(row)
    decoder.feed(data + data + data[:5], FDS)
    check(decoder.next_message(), row)
    second = decoder.next_message()
    assert second is not None
    assert second.fds == []
    assert second.payload == data[HEADER_SIZE:]
    assert decoder.next_message() is None
    with pytest.raises(PeerError, match="ended in the header"):
        decoder.end()


@EVERY
def test_wanted_never_crosses_a_boundary(row: Row) -> None:
    decoder = Decoder()
    data = sample(row) * 2
    at = 0
    boundaries = []
    while at < len(data):
        wanted = decoder.wanted
        decoder.feed(data[at : at + wanted])
        at += wanted
        boundaries.append(at)
        decoder.next_message()
    half = len(data) // 2
    assert half in boundaries
    assert HEADER_SIZE in boundaries


@EVERY
def test_one_byte_short_or_over(row: Row) -> None:
    payload = row.payload.encode(BODIES[row.payload])
    for wrong in (payload[:-1], payload + b"\0"):
        if wrong == payload:
            continue
        padded = row.payload in (INFLIGHT, IOTLB)
        if padded and row.payload.min_size <= len(wrong) <= row.payload.max_size:
            continue
        with pytest.raises(PeerError):
            row.payload.decode(wrong)


@pytest.mark.parametrize("ending", [1, 11, 12, 19])
def test_end_inside_a_message(ending: int) -> None:
    decoder = Decoder()
    decoder.feed(encode(lib.VHOST_USER_SET_FEATURES, bytes(8))[:ending])
    assert decoder.next_message() is None
    with pytest.raises(PeerError, match="header" if ending < HEADER_SIZE else "payload"):
        decoder.end()


@pytest.mark.parametrize(
    ("flags", "size", "words"),
    [
        (0, 0, "version 0"),
        (2, 0, "version 2"),
        (3, 0, "version 3"),
        (1 | REPLY, 0, "a reply"),
        (1 | 0x10, 0, "reserved flags 0x10"),
        (1 | 0x8000_0000, 0, "reserved flags"),
        (1, MAX_PAYLOAD + 1, "4097 bytes"),
        (1, 0xFFFF_FFFF, "4294967295 bytes"),
    ],
)
def test_bad_header(flags: int, size: int, words: str) -> None:
    decoder = Decoder()
    with pytest.raises(PeerError, match=words):
        decoder.feed(struct.pack("=III", 1, flags, size))


def test_bad_header_behind_a_good_message() -> None:
    decoder = Decoder()
    decoder.feed(encode(1) + struct.pack("=III", 1, 0, 0))
    with pytest.raises(PeerError, match="version 0"):
        decoder.next_message()


def test_largest_payload() -> None:
    message = decode_whole(encode(22, bytes(MAX_PAYLOAD)))
    assert len(message.payload) == MAX_PAYLOAD


@pytest.mark.parametrize("ending", [1, 12, 15])
def test_descriptors_in_the_middle(ending: int) -> None:
    data = encode(lib.VHOST_USER_SET_VRING_KICK, bytes(8))
    decoder = Decoder()
    decoder.feed(data[:ending], [5])
    with pytest.raises(PeerError, match="middle of a message"):
        decoder.feed(data[ending:], [6])
    assert decoder.take_fds() == [5]


@pytest.mark.parametrize("count", [0, 9, 33, 2**32 - 1])
def test_memory_table_count(count: int) -> None:
    with pytest.raises(PeerError):
        MEMORY_TABLE.decode(struct.pack("=II", count, 0) + bytes(32 * min(count, 9)))


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (8, 7)])
def test_memory_table_unlike_its_count(sizes: tuple[int, int]) -> None:
    count, held = sizes
    with pytest.raises(PeerError):
        MEMORY_TABLE.decode(struct.pack("=II", count, 0) + bytes(32 * held))


@pytest.mark.parametrize("size", [20, 24])
def test_inflight_with_and_without_padding(size: int) -> None:
    assert INFLIGHT.decode(bytes(size)) == Inflight(0, 0, 0, 0)


@pytest.mark.parametrize("size", [0, 3, 5, 2**32 - 1])
def test_config_size_unlike_its_data(size: int) -> None:
    with pytest.raises(PeerError):
        CONFIG.decode(struct.pack("=III", 0, size, 0) + b"abcd")


u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
regions = st.builds(MemoryRegion, u64, u64, u64, u64)
CASES: list[tuple[Format, st.SearchStrategy[object]]] = [
    (U64, u64),
    (VRING_STATE, st.builds(VringState, u32, u32)),
    (VRING_ADDR, st.builds(VringAddr, u32, u32, u64, u64, u64, u64)),
    (SINGLE_REGION, regions),
    (MEMORY_TABLE, st.lists(regions, min_size=1, max_size=8).map(tuple)),
    (INFLIGHT, st.builds(Inflight, u64, u64, u16, u16)),
    (
        CONFIG,
        st.builds(
            lambda offset, flags, data: ConfigAccess(offset, len(data), flags, data),
            u32,
            u32,
            st.binary(max_size=256),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].name)
@given(data=st.data())
def test_round_trip(case: tuple[Format, st.SearchStrategy[object]], data: st.DataObject) -> None:
    layout, values = case
    value = data.draw(values)
    payload = layout.encode(value)
    assert layout.min_size <= len(payload) <= layout.max_size
    assert layout.decode(decode_whole(encode(1, payload)).payload) == value


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(1, 50)))
def test_pieces_make_no_difference(data: bytes, cuts: list[int]) -> None:
    """Any bytes, in any pieces: the same messages and the same end as in one piece."""
    assert drain([data]) == drain(split(data, cuts))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    return [*pieces, data]


def drain(pieces: list[bytes]) -> tuple[list[Message], str | None]:
    decoder = Decoder()
    messages: list[Message] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            while (message := decoder.next_message()) is not None:
                messages.append(message)
        decoder.end()
    except PeerError as error:
        return messages, str(error)
    return messages, None
