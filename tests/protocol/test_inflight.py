"""In-flight regions: what the session lets a front-end say of them, and what a back-end does."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable

import pytest

from tests.protocol.fake import TIMEOUT, Peer, memory_file
from tests.protocol.messages import ADDR, REGION
from tests.protocol.test_connection import FdCount, Served, iothread, served
from tests.protocol.test_session import (
    EXTRAS,
    FEATURES,
    QUEUES,
    agreed,
    ready,
    refused,
    running,
    say,
)
from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.inflight import InflightRegion, inflight_size, new_inflight_file
from vdev.virtio.queue import F_RING_PACKED
from vdev.virtio.vhost_user.payloads import INFLIGHT, Inflight, VringState
from vdev.virtio.vhost_user.session import Session
from vdev.virtio.vhost_user.table import PROTOCOL_FEATURES

__all__ = ["iothread", "served"]  # fixtures

SIZE = 64
GOOD = Inflight(inflight_size(QUEUES, SIZE, packed=False), 0, QUEUES, SIZE)
PACKED = Inflight(inflight_size(QUEUES, SIZE, packed=True), 0, QUEUES, SIZE)
CHAIN = struct.Struct("=B5xHQ")
HEAD = struct.Struct("=QHHHH")
PACKED_HEAD = struct.Struct("=QHHHHHHBB10x")
DESC = struct.Struct("=BxHHHQHHIQ")
HUGE = 1 << 63


# The session


def test_asking_for_a_region() -> None:
    session = agreed()
    for queues, size in ((1, 1), (QUEUES, 32768), (1, 100)):
        say(session, "GET_INFLIGHT_FD", Inflight(0, 0, queues, size))
    assert session.inflight is None
    for queues, size in ((0, 64), (QUEUES + 1, 64), (65535, 64), (1, 0), (1, 32769), (1, 65535)):
        refused(session, "GET_INFLIGHT_FD", Inflight(0, 0, queues, size))


@pytest.mark.parametrize(
    "wrong",
    [
        GOOD._replace(mmap_size=0),
        GOOD._replace(mmap_size=GOOD.mmap_size - 1),
        GOOD._replace(num_queues=0),
        GOOD._replace(num_queues=QUEUES + 1),
        GOOD._replace(queue_size=0),
        GOOD._replace(queue_size=32769),
        GOOD._replace(mmap_offset=HUGE),
        GOOD._replace(mmap_size=HUGE - 1, mmap_offset=1),
        GOOD._replace(mmap_size=(1 << 64) - 1, mmap_offset=(1 << 64) - 1),
    ],
)
def test_regions_that_cannot_be(wrong: Inflight) -> None:
    refused(agreed(), "SET_INFLIGHT_FD", wrong)


def test_a_region_for_all_that_starts() -> None:
    session = ready()
    say(session, "SET_INFLIGHT_FD", GOOD)
    assert session.inflight == GOOD
    say(session, "SET_VRING_KICK", 0)
    refused(session, "SET_INFLIGHT_FD", GOOD)
    say(session, "GET_VRING_BASE", VringState(0, 0))
    say(session, "SET_INFLIGHT_FD", GOOD._replace(mmap_size=HUGE - 1))
    say(session, "RESET_DEVICE")
    assert session.inflight is None


def test_a_region_of_smaller_queues() -> None:
    session = ready()
    say(session, "SET_INFLIGHT_FD", GOOD._replace(queue_size=SIZE - 1))
    assert "64 entries" in refused(session, "SET_VRING_KICK", 0)
    say(session, "SET_VRING_NUM", VringState(0, 32))
    say(session, "SET_VRING_KICK", 0)


def test_leaving_requests_in_flight_takes_a_place_to_note_them() -> None:
    both = 1 << lib.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT | PROTOCOL_FEATURES | EXTRAS
    session = Session(features=0, protocol_features=both, num_queues=QUEUES, config_size=0)
    alone = both & ~(1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
    assert "INFLIGHT_SHMFD" in refused(session, "SET_PROTOCOL_FEATURES", alone)
    say(session, "SET_PROTOCOL_FEATURES", both)


def test_a_region_of_packed_queues_is_larger() -> None:
    session = agreed()
    say(session, "SET_FEATURES", FEATURES | F_RING_PACKED)
    refused(session, "SET_INFLIGHT_FD", GOOD)
    say(session, "SET_INFLIGHT_FD", PACKED)


def test_not_while_rings_run() -> None:
    refused(running(), "SET_INFLIGHT_FD", GOOD)


def test_the_answer_has_the_size_that_programs_in_c_expect() -> None:
    assert len(INFLIGHT.encode(GOOD)) == ffi.sizeof("struct vhost_user_inflight") == 24


# Files


@pytest.mark.parametrize(("packed", "queue_bytes"), [(False, 1664), (True, 3264)])
def test_a_new_file_is_zeroes_and_stays_as_long_as_it_is(packed: bool, queue_bytes: int) -> None:
    fd, size = new_inflight_file(3, 100, packed=packed)
    try:
        assert (
            size == inflight_size(3, 100, packed=packed) == os.fstat(fd).st_size == 3 * queue_bytes
        )
        assert os.pread(fd, size, 0) == bytes(size)
        for other in (0, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, other)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("offset", "queues"), [(8, 2), (4, 1), (0, 3), (HUGE, 1), ((1 << 64) - 8, 1)]
)
def test_numbers_that_the_file_does_not_bear(offset: int, queues: int) -> None:
    fd, _ = new_inflight_file(2, SIZE, packed=False)
    try:
        InflightRegion.map(fd, offset=0, num_queues=2, queue_size=SIZE, packed=False)
        with pytest.raises(PeerError, match="in-flight region at offset"):
            InflightRegion.map(fd, offset=offset, num_queues=queues, queue_size=SIZE, packed=False)
    finally:
        os.close(fd)


# A back-end


async def get(peer: Peer) -> tuple[Inflight, int]:
    await peer.send("GET_INFLIGHT_FD", Inflight(0, 0, QUEUES, SIZE))
    with peer.sock.dup() as sock:
        sock.settimeout(TIMEOUT)
        data, fds, _, _ = await asyncio.to_thread(socket.recv_fds, sock, 12 + 24, 4)
    assert len(fds) == 1
    return INFLIGHT.decode(data[12:]), fds[0]


async def set_up(served: Served, inflight: Inflight, fd: int) -> mmap.mmap:
    """Everything but the kick fd; gives the guest's memory."""
    peer = served.peer
    memory = memory_file(REGION.size)
    await peer.send("SET_MEM_TABLE", (REGION,), [memory])
    assert await peer.ack("SET_INFLIGHT_FD", inflight, [fd]) == 0
    await peer.send("SET_VRING_NUM", VringState(0, SIZE))
    await peer.send("SET_VRING_BASE", VringState(0, 0))
    await peer.send("SET_VRING_ADDR", ADDR)
    await peer.send("SET_VRING_ENABLE", VringState(0, 1))
    mapped = mmap.mmap(memory, REGION.size)
    os.close(memory)
    return mapped


async def kick(peer: Peer) -> int:
    fd = os.eventfd(0)
    try:
        return await peer.ack("SET_VRING_KICK", 0, [fd])
    finally:
        os.close(fd)


async def test_a_region_from_the_back_end(served: Served, fd_count: FdCount) -> None:
    await served.negotiate()
    before = fd_count()
    inflight, fd = await get(served.peer)
    assert inflight == GOOD
    for _ in range(100):
        os.close((await get(served.peer))[1])
    (await set_up(served, inflight, fd)).close()
    assert await kick(served.peer) == 0
    assert await served.peer.ask("GET_VRING_BASE", VringState(0, 0)) == VringState(0, 0)
    _, version, size, _, used = HEAD.unpack(os.pread(fd, HEAD.size, 0))
    assert (version, size, used) == (1, SIZE, 0)
    os.close(fd)
    # Kept for a process that takes over: those of guest memory and of the region.
    assert fd_count() - before == {"/memfd": 2}


async def test_goes_on_from_what_is_noted(served: Served) -> None:
    """Chain 5 was popped, and 3 before it completed: the base that is told does not count."""
    await served.negotiate()
    fd, size = new_inflight_file(QUEUES, SIZE, packed=False)
    os.pwrite(fd, HEAD.pack(0, 1, SIZE, 3, 41), 0)
    os.pwrite(fd, CHAIN.pack(1, 0, 7), HEAD.size + 5 * CHAIN.size)
    memory = await set_up(served, GOOD._replace(mmap_size=size), fd)
    used, avail = ADDR.used - REGION.user_addr, ADDR.avail - REGION.user_addr
    struct.pack_into("=H", memory, used + 2, 41)
    struct.pack_into("=H", memory, avail + 2, 42)
    # A chain without a place for the status comes back with length 0.
    struct.pack_into("=QIHH", memory, 5 * 16, REGION.guest_addr + 0x8000, 16, 0, 0)
    assert await kick(served.peer) == 0
    assert await served.peer.ask("GET_VRING_BASE", VringState(0, 0)) == VringState(0, 42)
    assert struct.unpack_from("=H", memory, used + 2)[0] == 42
    assert struct.unpack_from("=II", memory, used + 4 + 8 * (41 % SIZE)) == (5, 0)
    assert CHAIN.unpack(os.pread(fd, CHAIN.size, HEAD.size + 5 * CHAIN.size))[0] == 0
    memory.close()
    os.close(fd)


async def test_a_region_that_says_what_cannot_be(served: Served) -> None:
    await served.negotiate()
    fd, _ = new_inflight_file(QUEUES, SIZE, packed=False)
    os.pwrite(fd, HEAD.pack(0, 2, SIZE, 0, 0), 0)
    (await set_up(served, GOOD, fd)).close()
    assert await kick(served.peer) != 0
    assert not served.backend.session.rings[0].started
    os.pwrite(fd, HEAD.pack(0, 1, SIZE, 0, 0), 0)
    assert await kick(served.peer) == 0
    os.close(fd)


async def test_of_a_packed_ring(served: Served) -> None:
    """The layout is that of the features at the time, whatever ring starts."""
    await served.negotiate()
    await served.peer.send("SET_FEATURES", FEATURES | F_RING_PACKED)
    inflight, fd = await get(served.peer)
    assert inflight == PACKED
    (await set_up(served, inflight, fd)).close()
    assert await kick(served.peer) == 0
    await served.peer.ask("GET_VRING_BASE", VringState(0, 0))
    assert PACKED_HEAD.unpack(os.pread(fd, PACKED_HEAD.size, 0)) == (0, 1, SIZE, *[0] * 6)
    entries = os.pread(fd, SIZE * DESC.size, PACKED_HEAD.size)
    assert [next for _, next, *_ in DESC.iter_unpack(entries)] == list(range(1, SIZE + 1))
    await served.peer.send("SET_FEATURES", FEATURES)
    assert await kick(served.peer) != 0
    assert not served.backend.session.rings[0].started
    os.close(fd)


async def test_where_it_was_not_agreed(served: Served) -> None:
    await served.negotiate(without=1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
    await served.peer.send("GET_INFLIGHT_FD", GOOD)
    await served.peer.closed()


def test_only_some_devices_offer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdev.blk.device import BlkDevice
    from vdev.net.device import NetDevice

    assert BlkDevice.supports_inflight
    assert not NetDevice.supports_inflight  # it completes in order, so the used index tells


@pytest.mark.parametrize("failing", ["ftruncate", "fcntl"])
def test_a_host_that_fails(
    monkeypatch: pytest.MonkeyPatch, fd_count: FdCount, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    before = fd_count()
    module: Callable[..., object] | object = os if failing == "ftruncate" else fcntl
    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="no memory"):
        new_inflight_file(1, 1, packed=False)
    assert fd_count() == before
