"""Catalogue, control plane 24, 33-35: in-flight regions that are none, too small, or lie."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.frontend import wire
from tests.frontend.blk import LAYOUTS, T_IN, BlkClient, header
from tests.frontend.session import PROTOCOL_WANTED, Session
from tests.frontend.survivor import PROTOCOL, Survivor
from tests.frontend.wire import Protocol, Request, u64

from .target import (
    QUEUES,
    SPARE,
    Bad,
    Target,
    check_serves,
    expect_close,
    expect_refusal,
    spare_ring,
    start_spare,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
RING = 64
STRIDE = 1088  # 16 + 64 * 16, at a multiple of 64
SIZE = QUEUES * STRIDE
HEAD = struct.Struct("=QHHHH")
CHAIN = struct.Struct("=B5xHQ")


def unstarted(victim: Target) -> BlkClient:
    return victim.client(protocol=PROTOCOL, start=False)


def region(size: int = SIZE) -> int:
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def write_head(
    fd: int, *, version: int = 1, size: int = RING, head: int = 0, used: int = 0
) -> None:
    os.pwrite(fd, HEAD.pack(0, version, size, head, used), 0)


def write_chain(fd: int, index: int, *, flag: int = 1, following: int = 0) -> None:
    os.pwrite(fd, CHAIN.pack(flag, following, 0), HEAD.size + index * CHAIN.size)


# ---- 24 ----


def test_cp24_a_region_without_the_protocol_feature(victim: Target) -> None:
    description = wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING)
    with victim.client() as disk:
        expect_close(disk, Bad(Request.GET_INFLIGHT_FD, description))
    with victim.client() as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        expect_close(disk, Bad(Request.SET_INFLIGHT_FD, description, [fd]))


def test_cp24_rings_inside_the_region(victim: Target) -> None:
    """It lies in the file of guest memory, over a ring: the guest harms itself alone."""
    with unstarted(victim) as disk:
        memory = disk.memory.regions[0]
        description = wire.INFLIGHT.pack(SIZE, memory.offset, QUEUES, RING)
        disk.set_inflight_fd(description, memory.fd)
        os.pwrite(memory.fd, bytes(SIZE), memory.offset)
        disk.start_ring(0, disk.ring)
        disk.submit(header(T_IN), 513)
        disk.barrier()


# ---- 33 ----


@pytest.mark.parametrize(
    ("queues", "size"),
    [(0, 64), (QUEUES + 1, 64), (65535, 64), (1, 0), (1, 32769), (1, 65535), (0, 0)],
)
def test_cp33_numbers(victim: Target, queues: int, size: int) -> None:
    with unstarted(victim) as disk:
        expect_close(disk, Bad(Request.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, queues, size)))


def test_cp33_repeated_ten_thousand_times(victim: Target) -> None:
    """What is left behind is counted afterwards."""
    with unstarted(victim) as disk:
        for _ in range(10_000):
            description, fd = disk.get_inflight_fd(QUEUES, 32768)
            os.close(fd)
        size, offset, queues, entries = wire.INFLIGHT.unpack_from(description)
        assert (offset, queues, entries) == (0, QUEUES, 32768)
        assert size >= QUEUES * (16 + 16 * 32768)


# ---- 34 ----


@LETTERS
@pytest.mark.parametrize(
    ("size", "offset", "queues", "entries"),
    [
        pytest.param(0, 0, QUEUES, RING, id="size-0"),
        pytest.param(SIZE - 1, 0, QUEUES, RING, id="too-small"),
        pytest.param(1 << 62, 0, 256, RING, id="too-many-queues"),
        pytest.param(SIZE, 0, 0, RING, id="no-queues"),
        pytest.param(1 << 40, 0, QUEUES, 65535, id="queues-too-large"),
        pytest.param(SIZE, 0, QUEUES, 0, id="queues-of-0"),
        pytest.param(SIZE, 64, QUEUES, RING, id="beyond-the-file"),
        pytest.param(SIZE, 1, 1, RING, id="offset-misaligned"),
        pytest.param(SIZE, (1 << 64) - 64, QUEUES, RING, id="offset-and-size-wrap"),
        pytest.param((1 << 64) - 64, 128, QUEUES, RING, id="size-and-offset-wrap"),
        pytest.param(SIZE, 1 << 63, QUEUES, RING, id="offset-over-2-63"),
    ],
)
def test_cp34_numbers(
    victim: Target, size: int, offset: int, queues: int, entries: int, letter: str
) -> None:
    with unstarted(victim) as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        bad = Bad(Request.SET_INFLIGHT_FD, wire.INFLIGHT.pack(size, offset, queues, entries), [fd])
        disk.rings.clear()
        expect_refusal(disk, bad, letter)


@LETTERS
@pytest.mark.parametrize("kind", ["null", "directory", "read-only", "pipe"])
def test_cp34_what_is_no_region(victim: Target, tmp_path: Path, kind: str, letter: str) -> None:
    with unstarted(victim) as disk, ExitStack() as stack:
        if kind == "pipe":
            fd, writing = os.pipe()
            stack.callback(os.close, writing)
        elif kind == "null":
            fd = os.open("/dev/null", os.O_RDWR)
        elif kind == "directory":
            fd = os.open(tmp_path, os.O_RDONLY)
        else:
            (tmp_path / "region").write_bytes(bytes(SIZE))
            fd = os.open(tmp_path / "region", os.O_RDONLY)
        stack.callback(os.close, fd)
        bad = Bad(Request.SET_INFLIGHT_FD, wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING), [fd])
        disk.rings.clear()
        expect_refusal(disk, bad, letter)


@LETTERS
def test_cp34_while_rings_run(victim: Target, letter: str) -> None:
    with Survivor(victim.socket) as disk:
        fd = region()
        bad = Bad(Request.SET_INFLIGHT_FD, wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING), [fd])
        expect_refusal(disk, bad, letter)
        os.close(fd)


def test_cp34_queues_smaller_than_the_ring(victim: Target) -> None:
    with unstarted(victim) as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        disk.set_inflight_fd(wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING // 2), fd)
        ring = spare_ring(disk, stack, size=RING)
        disk.configure_ring(SPARE, ring)
        bad = Bad(Request.SET_VRING_KICK, u64(SPARE), [ring.kick_fd])
        assert disk.wire.ack_of(bad.request, bad.payload, bad.fds) != 0
        small = spare_ring(disk, stack, size=RING // 2)
        disk.start_ring(SPARE, small)
        disk.get_vring_base(SPARE)


# ---- 35 ----


@pytest.mark.parametrize(
    "lie",
    [
        "unknown-version",
        "desc-num-changed",
        "flag-2",
        "last-batch-head-out-of-range",
        "loop-in-next",
        "next-out-of-range",
        "batch-over-the-ring",
    ],
)
def test_cp35_content(victim: Target, lie: str) -> None:
    """The ring does not start, and another region mends that."""
    with unstarted(victim) as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        write_head(fd, used=65533)  # three chains were shown last
        for index in range(4):
            write_chain(fd, index, following=index + 1)
        if lie == "unknown-version":
            write_head(fd, version=2)
        elif lie == "desc-num-changed":
            write_head(fd, size=RING - 1)
        elif lie == "flag-2":
            write_chain(fd, 60, flag=2)
        elif lie == "last-batch-head-out-of-range":
            write_head(fd, head=RING, used=65535)
        elif lie == "loop-in-next":
            write_chain(fd, 1, following=0)
        elif lie == "next-out-of-range":
            write_chain(fd, 1, following=65535)
        else:
            write_head(fd, used=65536 - RING - 1)
        disk.set_inflight_fd(wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING), fd)
        disk.configure_ring(0, disk.ring)
        before = os.pread(fd, SIZE, 0)
        assert disk.wire.ack_of(Request.SET_VRING_KICK, u64(0), [disk.ring.kick_fd]) != 0
        assert os.pread(fd, SIZE, 0) == before
        os.pwrite(fd, bytes(SIZE), 0)
        disk.set_vring_kick(0, disk.ring)
        disk.enable(0)
        disk.driver_ok()
        check_serves(disk)


PACKED_STRIDE = 2112  # 32 + 64 * 32, at a multiple of 64
PACKED_HEAD = struct.Struct("=QHHHHHHBB10x")
ENTRY = struct.Struct("=BxHHHQHHIQ")


def forge_packed(fd: int, **lie: int) -> None:
    """A server was killed that had one chain in flight, of entry 0; but for the lie."""
    said = {"version": 1, "num": RING, "free": 1, "used": 0, "wrap": 1, "last": 0, "chain": 1}
    said |= {"flag": 1, "end": RING} | lie
    heads, used, wraps = 2 * [said["free"]], 2 * [said["used"]], 2 * [said["wrap"]]
    head = PACKED_HEAD.pack(0, said["version"], said["num"], *heads, *used, *wraps)
    entries = [ENTRY.pack(said["flag"], 1, said["last"], said["chain"], 0, 0, 0, 16, 0)]
    for n in range(1, RING):
        entries.append(ENTRY.pack(0, n + 1 if n + 1 < RING else said["end"], *[0] * 7))
    os.pwrite(fd, head + b"".join(entries), 0)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param({"version": 2}, id="unknown-version"),
        pytest.param({"num": RING - 1}, id="desc-num-changed"),
        pytest.param({"flag": 2}, id="flag-2"),
        pytest.param({"flag": 0}, id="chain-forgotten"),
        pytest.param({"free": RING + 1}, id="free-head-out-of-range"),
        pytest.param({"free": RING}, id="no-list"),
        pytest.param({"end": 5}, id="loop-in-list"),
        pytest.param({"end": 65535}, id="list-out-of-range"),
        pytest.param({"used": RING}, id="used-out-of-range"),
        pytest.param({"wrap": 2}, id="wrap-counter-2"),
        pytest.param({"chain": 2}, id="chain-too-long"),
        pytest.param({"last": 1}, id="chain-ends-elsewhere"),
    ],
)
def test_cp35_content_of_packed_rings(victim: Target, lie: dict[str, int]) -> None:
    with (
        victim.client(features=LAYOUTS["packed"], protocol=PROTOCOL, start=False) as disk,
        ExitStack() as stack,
    ):
        fd = region(QUEUES * PACKED_STRIDE)
        stack.callback(os.close, fd)
        forge_packed(fd, **lie)
        disk.set_inflight_fd(wire.INFLIGHT.pack(QUEUES * PACKED_STRIDE, 0, QUEUES, RING), fd)
        ring = disk.rings[0]
        disk.configure_ring(0, ring)
        before = os.pread(fd, PACKED_STRIDE, 0)
        assert disk.wire.ack_of(Request.SET_VRING_KICK, u64(0), [ring.kick_fd]) != 0
        assert os.pread(fd, PACKED_STRIDE, 0) == before
        os.pwrite(fd, bytes(PACKED_STRIDE), 0)
        disk.set_vring_kick(0, ring)
        disk.enable(0)
        disk.driver_ok()
        check_serves(disk)


def test_cp35_chains_that_nobody_made_available(victim: Target) -> None:
    """Heads of which the ring knows nothing: it breaks, whatever their descriptors hold."""
    with unstarted(victim) as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        write_head(fd)
        for index in range(RING):
            write_chain(fd, index)
        disk.set_inflight_fd(wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING), fd)
        disk.start_ring(0, disk.ring)
        disk.driver_ok()
        disk.ring.wait_broken()
        disk.rings.clear()
        start_spare(disk)


def test_cp35_written_all_over_while_rings_run(victim: Target) -> None:
    with Survivor(victim.socket) as disk:
        for n in range(200):
            os.pwrite(disk.inflight_fd, os.urandom(STRIDE), 0)
            check_serves(disk, sector=64 + n % 8)


def test_cp35_truncated_while_rings_run(victim: Target) -> None:
    """The back-end's own file is sealed; one of the front-end's may shrink: its rings break."""
    with Survivor(victim.socket) as disk, pytest.raises(PermissionError):
        os.ftruncate(disk.inflight_fd, 0)
    with unstarted(victim) as disk, ExitStack() as stack:
        fd = region()
        stack.callback(os.close, fd)
        disk.set_inflight_fd(wire.INFLIGHT.pack(SIZE, 0, QUEUES, RING), fd)
        disk.start_ring(0, disk.ring)
        disk.driver_ok()
        check_serves(disk)
        os.ftruncate(fd, 0)
        disk.submit(header(T_IN), 513)
        disk.ring.wait_broken()


def test_it_is_offered(victim: Target) -> None:
    with Session(victim.socket) as session:
        assert session.get_protocol_features() & Protocol.INFLIGHT_SHMFD
        assert not PROTOCOL_WANTED & Protocol.INFLIGHT_SHMFD  # clients of other tests do without
