"""The dirty log under random requests: every page that changed is in it, and few others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frontend.blk import (
    LAYOUTS,
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
    T_WRITE_ZEROES,
    BlkClient,
    header,
    segment,
)
from tests.frontend.log import DirtyLog, changes, pages, snapshot
from tests.frontend.packed import PackedRing
from tests.frontend.session import PROTOCOL_WANTED
from tests.frontend.wire import Protocol

from .serving import Disk

SIZE = 4 << 20
SECTORS = SIZE // SECTOR
OPTIONS = {
    "page-cache": (),
    "direct": ("--cache", "none"),
    "threads": ("--engine", "threads"),
    "packed": (),
}


class Asked(NamedTuple):
    """A request and how its writable bytes are cut."""

    readable: bytes
    room: int
    into: list[int]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    kind = draw(
        st.sampled_from(
            [T_IN, T_IN, T_IN, T_OUT, T_FLUSH, T_GET_ID, T_GET_LIFETIME, T_WRITE_ZEROES, T_DISCARD]
        )
    )
    sector = draw(st.integers(0, SECTORS - 1))
    data, room = b"", 0
    if kind == T_IN:
        room = SECTOR * draw(st.integers(0, 64))
    elif kind == T_OUT:
        seed = draw(st.integers(0, 1 << 32))
        data = random.Random(seed).randbytes(SECTOR * draw(st.integers(1, 16)))
    elif kind == T_GET_ID:
        room = 20
    elif kind in (T_WRITE_ZEROES, T_DISCARD):
        data = segment(sector, draw(st.integers(1, 16)))
    cuts = sorted(draw(st.sets(st.integers(1, room), max_size=4))) if room else []
    into = [high - low for low, high in zip([0, *cuts], [*cuts, room + 1], strict=True)]
    return Asked(header(kind, sector) + data, room, into)


@pytest.fixture(scope="module", params=OPTIONS)
def logged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[BlkClient, DirtyLog]]:
    directory: Path = tmp_path_factory.mktemp("logged")
    image = directory / "disk.img"
    image.write_bytes(random.Random(7).randbytes(SIZE))
    with Disk(directory, image, *OPTIONS[request.param]) as served:
        protocol = PROTOCOL_WANTED | Protocol.LOG_SHMFD
        features = LAYOUTS["packed" if request.param == "packed" else "split"]
        with (
            served.client(protocol=protocol, features=features) as disk,
            DirtyLog(disk.memory, offset=4096) as log,
        ):
            disk.start_logging(log, disk.rings)
            yield disk, log


def ring_pages(disk: BlkClient) -> set[int]:
    """What the device may write of its ring."""
    ring = disk.rings[0]
    found = pages(ring.used, ring.areas[2][0])
    if isinstance(ring, PackedRing):
        found |= pages(ring.desc, ring.areas[0][0])
    return found


@given(asked=st.lists(requests(), min_size=1, max_size=8))
def test_every_page_that_changed_is_logged(
    logged: tuple[BlkClient, DirtyLog], asked: list[Asked]
) -> None:
    disk, log = logged
    log.take()
    pending = [disk.submit(a.readable, a.room + 1, into=a.into, kick=False) for a in asked]
    before = snapshot(disk.memory)
    disk.rings[0].kick()
    allowed = ring_pages(disk)
    for request in pending:
        used = disk.used_of(request)
        address, size = request.writable
        status = disk.memory.read(address + size - 1, 1)[0]
        assert status in (S_OK, S_IOERR, S_UNSUPP)
        assert used.len <= size
        allowed |= pages(*request.writable)
    disk.set_features(disk.features)  # answered between two passes: the used ring is logged, too
    after = snapshot(disk.memory)
    found = log.take()
    # The driver's own: where it says when it wants to be called.
    ring = disk.rings[0]
    ours = pages(ring.avail, ring.areas[1][0])
    assert changes(before, after) - ours <= found
    assert found <= allowed
    assert log.stray() == 0
    for request in pending:
        disk.release(request)


def test_a_log_that_is_off_stays_clear(logged: tuple[BlkClient, DirtyLog]) -> None:
    disk, log = logged
    disk.stop_logging(disk.rings)
    log.take()
    disk.read(0, 65536)
    disk.barrier()
    assert log.take() == set()
    disk.start_logging(log, disk.rings)
    disk.read(0, 65536)
    disk.set_features(disk.features)
    assert len(log.take()) >= 16


def test_a_used_ring_is_logged_only_where_it_was_told(
    logged: tuple[BlkClient, DirtyLog],
) -> None:
    disk, log = logged
    ring = disk.rings[0]
    disk.set_vring_addr(0, ring)
    log.take()
    pending = disk.submit(header(T_FLUSH), 1)
    disk.finish(pending)
    disk.set_features(disk.features)
    assert log.take() == pages(*pending.writable)
    elsewhere = disk.memory.regions[1].guest_addr + (1 << 20)
    disk.set_vring_addr(0, ring, log=elsewhere)
    log.take()
    pending = disk.submit(header(T_FLUSH), 1)
    disk.finish(pending)
    disk.set_features(disk.features)
    # Of a packed ring only the third area is told.
    used = ring_pages(disk) if isinstance(ring, PackedRing) else set()
    found = log.take()
    assert found >= pages(*pending.writable) | {elsewhere}
    assert found <= pages(*pending.writable) | {elsewhere} | used
    disk.set_vring_addr(0, ring, log=ring.used)
