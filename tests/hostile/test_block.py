"""Catalogue, block 53-60: requests that are wrong in themselves, on a ring that is right.

Letter I: the request gets its status, nothing else changes.  Letter D where it has no place for
one: the head comes back with length 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.frontend.blk import (
    F_DISCARD,
    F_WRITE_ZEROES,
    FEATURES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_GET_LIFETIME,
    T_IN,
    T_OUT,
    T_SCSI_CMD,
    T_SECURE_ERASE,
    T_WRITE_ZEROES,
    UNMAP,
    BlkClient,
    header,
    segment,
)
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import Desc, Used
from tests.frontend.server import Server

from .target import CAPACITY, Target, check_serves

LAST = CAPACITY - 1
SEG_MAX = 126


@pytest.fixture
def disk(victim: Target) -> Iterator[BlkClient]:
    with victim.client(size=256) as client:
        yield client


def expect_status(disk: BlkClient, status: int, readable: bytes, room: int = 0) -> None:
    """Letter I, and the ring goes on."""
    done = disk.finish(disk.submit(readable, room + 1))
    assert done.status == status
    assert 1 <= done.used <= room + 1
    check_serves(disk)


# ---- 53: framing ----


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        pytest.param(header(T_IN), 0, id="b53-header-alone"),
        pytest.param(header(T_OUT) + bytes(SECTOR), 0, id="b53-status-not-writable"),
        pytest.param(header(T_OUT) + bytes(SECTOR + 1), 0, id="b53-status-readable"),
        pytest.param(header(T_FLUSH), 0, id="b53-flush-without-status"),
        pytest.param(header(T_DISCARD) + segment(0, 8), 0, id="b53-discard-without-status"),
        pytest.param(b"\0", 0, id="b53-one-byte"),
    ],
)
def test_b53_no_place_for_a_status(
    disk: BlkClient, victim: Target, readable: bytes, writable: int
) -> None:
    before = victim.image.read_bytes()
    pending = disk.submit(readable, writable)
    assert disk.used_of(pending) == Used(pending.head, 0)
    assert victim.image.read_bytes() == before
    check_serves(disk)


@pytest.mark.parametrize("size", [0, 1, 8, 15], ids="b53-header-of-{}".format)
def test_b53_short_header(disk: BlkClient, size: int) -> None:
    expect_status(disk, S_IOERR, header(T_IN)[:size], SECTOR)


@pytest.mark.parametrize(
    "out",
    [
        pytest.param([8, 8], id="b53-header-8-8"),
        pytest.param([1] * 16, id="b53-header-16-of-1"),
        pytest.param([1, 15], id="b53-header-1-15"),
        pytest.param([15, 1], id="b53-header-15-1"),
        pytest.param([4, 4, 8], id="b53-header-by-field"),
    ],
)
@pytest.mark.parametrize(
    "into",
    [
        pytest.param([SECTOR, 1], id="status-apart"),
        pytest.param([SECTOR + 1], id="status-with-data"),
        pytest.param([1] * 20 + [SECTOR - 20, 1], id="data-in-crumbs"),
        pytest.param([511, 2], id="data-511-and-1"),
        pytest.param([1, 511, 1], id="data-1-and-511"),
    ],
)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_b53_any_framing_of_a_read(
    disk: BlkClient, victim: Target, out: Sequence[int], into: Sequence[int], indirect: bool
) -> None:
    done = disk.request(T_IN, 3, room=SECTOR, out=out, into=into, indirect=indirect)
    assert (done.status, done.used) == (S_OK, SECTOR + 1)
    assert done.data == victim.image.read_bytes()[3 * SECTOR : 4 * SECTOR]


@pytest.mark.parametrize(
    "out",
    [
        pytest.param([16 + 1024], id="b53-header-with-data"),
        pytest.param([8, 8 + 1024], id="b53-half-a-header-with-data"),
        pytest.param([16, 1, 1023], id="b53-data-1-and-1023"),
        pytest.param([17, 1023], id="b53-header-and-a-byte"),
        pytest.param([1] * 40 + [1000], id="b53-crumbs"),
    ],
)
def test_b53_any_framing_of_a_write(disk: BlkClient, out: Sequence[int]) -> None:
    data = os.urandom(1024)
    done = disk.request(T_OUT, 100, data, out=out)
    assert (done.status, done.used) == (S_OK, 1)
    assert disk.read(100, 1024) == data


# ---- 54, 55: bounds and sizes ----


@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["b54-in", "b54-out"])
@pytest.mark.parametrize(
    ("sector", "size"),
    [
        pytest.param(CAPACITY, SECTOR, id="at-the-capacity"),
        pytest.param(CAPACITY + 1, SECTOR, id="behind-the-capacity"),
        pytest.param(LAST, 2 * SECTOR, id="over-the-capacity"),
        pytest.param(LAST - 1, 3 * SECTOR, id="sum-of-segments-over"),
        pytest.param(1 << 55, SECTOR, id="2-55"),
        pytest.param((1 << 55) - 1, 2 * SECTOR, id="2-55-minus-1"),
        pytest.param(1 << 63, SECTOR, id="2-63"),
        pytest.param((1 << 64) - 1, SECTOR, id="2-64-minus-1"),
        pytest.param((1 << 64) - 1, 2 * SECTOR, id="2-64-minus-1-and-2"),
    ],
)
def test_b54_out_of_bounds(
    disk: BlkClient, victim: Target, kind: int, sector: int, size: int
) -> None:
    before = victim.image.read_bytes()
    cuts = [SECTOR] * (size // SECTOR)
    if kind == T_IN:
        done = disk.request(kind, sector, room=size, into=[*cuts, 1])
        assert done.data == b"\xee" * size, "data given with an error"
    else:
        done = disk.request(kind, sector, os.urandom(size), out=[16, *cuts])
    assert done.status == S_IOERR
    assert victim.image.read_bytes() == before
    check_serves(disk)


def test_b54_last_sector(disk: BlkClient, victim: Target) -> None:
    data = os.urandom(SECTOR)
    disk.write(LAST, data)
    assert disk.read(LAST, SECTOR) == data
    assert victim.image.stat().st_size == CAPACITY * SECTOR


@pytest.mark.parametrize("size", [1, 511, 513, 1023, 4097], ids="b55-{}-bytes".format)
@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["in", "out"])
def test_b55_not_whole_sectors(disk: BlkClient, victim: Target, kind: int, size: int) -> None:
    before = victim.image.read_bytes()
    if kind == T_IN:
        done = disk.request(kind, 8, room=size)
    else:
        done = disk.request(kind, 8, os.urandom(size))
    assert done.status == S_IOERR
    assert victim.image.read_bytes() == before
    check_serves(disk)


@pytest.mark.parametrize(
    ("kind", "data", "room"),
    [
        pytest.param(T_IN, SECTOR, 0, id="b55-in-with-readable-data"),
        pytest.param(T_OUT, 0, SECTOR, id="b55-out-with-writable-data"),
        pytest.param(T_IN, SECTOR, SECTOR, id="b55-in-with-both"),
        pytest.param(T_OUT, SECTOR, SECTOR, id="b55-out-with-both"),
        pytest.param(T_DISCARD, 0, 16, id="b55-discard-with-writable-data"),
        pytest.param(T_WRITE_ZEROES, 0, 16, id="b55-write-zeroes-with-writable-data"),
    ],
)
def test_b55_wrong_direction(
    disk: BlkClient, victim: Target, kind: int, data: int, room: int
) -> None:
    before = victim.image.read_bytes()
    done = disk.request(kind, 8, os.urandom(data), room=room)
    assert done.status == S_IOERR
    assert victim.image.read_bytes() == before
    check_serves(disk)


# ---- 56: read-only ----


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("read-only")
    socket, image = directory / "disk.sock", directory / "disk.img"
    image.write_bytes(os.urandom(1 << 20))
    command = ("blk", "serve", "--socket-path", socket, "--blk-file", image, "--read-only")
    with Server.vdev(*command):
        yield socket, image


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        pytest.param(T_OUT, bytes(SECTOR), S_IOERR, id="b56-out"),
        pytest.param(T_OUT, bytes(8 * SECTOR), S_IOERR, id="b56-out-4k"),
        # Neither is offered on a read-only disk: what was not negotiated is unsupported.
        pytest.param(T_DISCARD, segment(0, 8), S_UNSUPP, id="b56-discard"),
        pytest.param(T_WRITE_ZEROES, segment(0, 8), S_UNSUPP, id="b56-write-zeroes"),
    ],
)
def test_b56_read_only(read_only: tuple[Path, Path], kind: int, data: bytes, status: int) -> None:
    socket, image = read_only
    before = image.read_bytes()
    with BlkClient(socket) as disk:
        assert disk.request(kind, 0, data).status == status
        assert disk.read(0, SECTOR) == before[:SECTOR]
    assert image.read_bytes() == before


def test_b56_flush_is_legal(read_only: tuple[Path, Path]) -> None:
    with BlkClient(read_only[0]) as disk:
        disk.flush()


# ---- 57, 58: ranges ----


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES], ids=["b57-discard", "b57-zeroes"])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"", S_IOERR, id="no-segment"),
        pytest.param(segment(0, 8)[:15], S_IOERR, id="15-bytes"),
        pytest.param(segment(0, 8) + b"\0", S_IOERR, id="17-bytes"),
        pytest.param(segment(0, 8) + segment(8, 8)[:8], S_IOERR, id="24-bytes"),
        pytest.param(segment(0, 8, 1 << 1), S_UNSUPP, id="reserved-flag-1"),
        pytest.param(segment(0, 8, 1 << 31), S_UNSUPP, id="reserved-flag-31"),
        pytest.param(segment(0, 8, 0xFFFFFFFF), S_UNSUPP, id="all-flags"),
        pytest.param(segment(CAPACITY, 8), S_IOERR, id="at-the-capacity"),
        pytest.param(segment(LAST, 2), S_IOERR, id="over-the-capacity"),
        pytest.param(segment(1 << 55, 8), S_IOERR, id="sector-2-55"),
        pytest.param(segment((1 << 64) - 1, 2), S_IOERR, id="wraps"),
        pytest.param(segment(0, 0xFFFFFFFF), S_IOERR, id="2-32-minus-1-sectors"),
        pytest.param(segment(0, 0x400000), S_IOERR, id="more-than-the-maximum"),
        pytest.param(segment(0, 8) + segment(CAPACITY, 8), S_IOERR, id="second-out-of-bounds"),
        pytest.param(segment(0, 8) + segment(8, 8, 2), S_UNSUPP, id="second-with-a-flag"),
    ],
)
def test_b57_bad_ranges(
    disk: BlkClient, victim: Target, kind: int, data: bytes, status: int
) -> None:
    before = victim.image.read_bytes()
    assert disk.request(kind, 0, data).status == status
    assert victim.image.read_bytes() == before, "a refused request acted in part"
    check_serves(disk)


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES], ids=["b57-discard", "b57-zeroes"])
def test_b57_too_many_segments(disk: BlkClient, victim: Target, kind: int) -> None:
    config = disk.config()
    most = config.max_discard_seg if kind == T_DISCARD else config.max_write_zeroes_seg
    before = victim.image.read_bytes()
    data = b"".join(segment(8 * n, 8) for n in range(most + 1))
    assert disk.request(kind, 0, data).status == S_IOERR
    assert victim.image.read_bytes() == before
    assert disk.request(kind, 0, data[:-16]).status == S_OK


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES], ids=["b57-discard", "b57-zeroes"])
def test_b57_segment_of_0_sectors(disk: BlkClient, victim: Target, kind: int) -> None:
    before = victim.image.read_bytes()
    assert disk.request(kind, 0, segment(8, 0)).status in (S_OK, S_IOERR)
    assert victim.image.read_bytes() == before
    check_serves(disk)


def test_b57_unmap_on_discard(disk: BlkClient, victim: Target) -> None:
    """virtio 1.3, section 5.2.6.2: unmap is reserved in a discard, and unsupported."""
    before = victim.image.read_bytes()
    assert disk.request(T_DISCARD, 0, segment(0, 8, UNMAP)).status == S_UNSUPP
    assert victim.image.read_bytes() == before


@pytest.mark.parametrize(
    "out",
    [
        pytest.param([16, 8, 24], id="b57-segment-8-and-8"),
        pytest.param([16] + [1] * 32, id="b57-segments-in-crumbs"),
        pytest.param([15, 33], id="b57-segments-with-header"),
        pytest.param([16, 31, 1], id="b57-last-byte-apart"),
    ],
)
def test_b57_segments_split_over_descriptors(disk: BlkClient, out: Sequence[int]) -> None:
    disk.write(200, os.urandom(32 * SECTOR))
    data = segment(200, 8) + segment(216, 8)
    kept = disk.read(208, 8 * SECTOR)
    assert disk.request(T_WRITE_ZEROES, 0, data, out=out).status == S_OK
    assert disk.read(200, 8 * SECTOR) == bytes(8 * SECTOR)
    assert disk.read(208, 8 * SECTOR) == kept
    assert disk.read(216, 8 * SECTOR) == bytes(8 * SECTOR)


@pytest.mark.parametrize(
    ("kind", "feature"),
    [
        pytest.param(T_DISCARD, F_DISCARD, id="b58-discard"),
        pytest.param(T_WRITE_ZEROES, F_WRITE_ZEROES, id="b58-write-zeroes"),
        pytest.param(T_SECURE_ERASE, 0, id="b58-secure-erase"),
    ],
)
def test_b58_not_negotiated(victim: Target, kind: int, feature: int) -> None:
    before = victim.image.read_bytes()
    with victim.client(features=FEATURES & ~feature) as disk:
        assert disk.request(kind, 0, segment(0, 8)).status == S_UNSUPP
        assert victim.image.read_bytes() == before
        check_serves(disk)


# ---- 59, 60: the other requests ----


@pytest.mark.parametrize(
    ("room", "status"),
    [(1, S_IOERR), (19, S_IOERR), (0, S_IOERR)],
    ids=["b59-get-id-of-1", "b59-get-id-of-19", "b59-get-id-of-0"],
)
def test_b59_get_id_too_short(disk: BlkClient, room: int, status: int) -> None:
    done = disk.request(T_GET_ID, room=room)
    assert done.status == status
    assert done.data == b"\xee" * room
    check_serves(disk)


def test_b59_get_id_of_21(disk: BlkClient) -> None:
    """One byte more than the 20: refused, or 20 bytes and no more."""
    done = disk.request(T_GET_ID, room=21)
    if done.status == S_OK:
        assert done.data == b"hostile".ljust(20, b"\0") + b"\xee"
    else:
        assert done.status == S_IOERR
    check_serves(disk)


def test_b59_get_id_in_crumbs(disk: BlkClient) -> None:
    done = disk.request(T_GET_ID, room=20, into=[1] * 20 + [1])
    assert (done.status, done.used) == (S_OK, 21)
    assert done.data == b"hostile".ljust(20, b"\0")


@pytest.mark.parametrize(
    ("sector", "data", "room"),
    [
        pytest.param(0, SECTOR, 0, id="b59-flush-with-data"),
        pytest.param(0, 0, SECTOR, id="b59-flush-with-room"),
        pytest.param(1 << 55, 0, 0, id="b59-flush-with-a-sector"),
    ],
)
def test_b59_flush_with_extras(disk: BlkClient, sector: int, data: int, room: int) -> None:
    done = disk.request(T_FLUSH, sector, bytes(data), room=room)
    assert done.status == S_OK
    check_serves(disk)


@pytest.mark.parametrize(
    "kind",
    [2, 3, 5, 6, 7, 9, 12, 15, 16, 26, 99, 0x80000000, 0x80000001, 0x80000004, 0xFFFFFFFF],
    ids="b60-type-{:#x}".format,
)
def test_b60_unknown_type(disk: BlkClient, victim: Target, kind: int) -> None:
    """SCSI commands and the barrier bit (31) among them: never offered."""
    before = victim.image.read_bytes()
    assert disk.request(kind, 0, bytes(SECTOR)).status == S_UNSUPP
    assert victim.image.read_bytes() == before
    check_serves(disk)


@pytest.mark.parametrize("kind", [T_SCSI_CMD, T_GET_LIFETIME], ids=["b60-scsi", "b60-lifetime"])
def test_b60_not_offered_with_room(disk: BlkClient, kind: int) -> None:
    done = disk.request(kind, room=SECTOR)
    assert done.status == S_UNSUPP
    assert done.data == b"\xee" * SECTOR


@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["b60-in", "b60-out"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_b60_segments(disk: BlkClient, victim: Target, kind: int, indirect: bool) -> None:
    """seg_max data segments are served; one more is refused (direct) or over the chain limit."""
    assert disk.config().seg_max == SEG_MAX
    for count, status in [(SEG_MAX, S_OK), (SEG_MAX + 1, S_IOERR)]:
        before = victim.image.read_bytes()
        cuts = [SECTOR] * count
        data = os.urandom(count * SECTOR)
        if kind == T_IN:
            done = disk.request(T_IN, 0, room=count * SECTOR, into=[*cuts, 1], indirect=indirect)
        else:
            done = disk.request(T_OUT, 0, data, out=[16, *cuts], indirect=indirect)
        assert done.status == status
        after = victim.image.read_bytes()
        if kind == T_IN and status == S_OK:
            assert done.data == before[: count * SECTOR]
        if kind == T_OUT:
            assert after[: len(data)] == (data if status == S_OK else before[: len(data)])
    check_serves(disk)


def test_b60_splits_are_not_segments(victim: Target) -> None:
    """seg_max counts the driver's segments, not those that a seam between regions makes."""
    memory = GuestMemory.default()
    at = 1 << 34
    for _ in range(3):
        memory.add(Region(at, 1 << 16))
        at += 1 << 16
    seam = (1 << 34) + (1 << 16)
    with victim.client(memory=memory, size=256) as disk:
        head, status = memory.alloc(16, 16), memory.alloc(1)
        memory.write(head, header(T_IN))
        first = seam - 100
        cuts = [Desc(first + n * SECTOR, SECTOR, True) for n in range(SEG_MAX)]
        disk.ring.submit([Desc(head, 16), *cuts, Desc(status, 1, True)])
        assert disk.ring.wait().len == SEG_MAX * SECTOR + 1
        assert memory.read(status, 1) == bytes([S_OK])
        assert memory.read(first, SEG_MAX * SECTOR) == victim.image.read_bytes()[: SEG_MAX * SECTOR]
