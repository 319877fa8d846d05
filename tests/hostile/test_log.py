"""Catalogue, control plane 24, 31, 32: dirty logs that are none, too small, changed in mid-use."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from tests.frontend import wire
from tests.frontend.blk import FEATURES, T_IN, BlkClient, header
from tests.frontend.log import DirtyLog, pages
from tests.frontend.memory import PAGE, Region
from tests.frontend.ring import SplitRing
from tests.frontend.session import F_LOG_ALL, F_LOG_USED, PROTOCOL_WANTED, Session
from tests.frontend.wire import Protocol, Request, u64, vring_addr

from .target import (
    SPARE,
    Bad,
    Target,
    check_serves,
    check_unchanged,
    expect_broken,
    expect_close,
    expect_error_ack,
    expect_refusal,
    submit_slow,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
PROTOCOL = PROTOCOL_WANTED | Protocol.LOG_SHMFD
WRAP = (1 << 64) - PAGE


def client(victim: Target, *, queues: int = 1) -> BlkClient:
    return victim.client(queues=queues, protocol=PROTOCOL)


def logged_addr(index: int, ring: SplitRing, log: int, flags: int = F_LOG_USED) -> Bad:
    user = ring.memory.user_addr
    return Bad(
        Request.SET_VRING_ADDR,
        vring_addr(index, user(ring.desc), user(ring.used), user(ring.avail), log=log, flags=flags),
    )


# ---- 24 ----


def test_cp24_a_log_without_the_protocol_feature(victim: Target) -> None:
    with victim.client() as disk, DirtyLog(disk.memory) as log:
        expect_close(disk, Bad(Request.SET_LOG_BASE, log.pack(), [log.fd]))


@LETTERS
def test_cp24_log_fd_without_the_protocol_feature(victim: Target, letter: str) -> None:
    with victim.client() as disk:
        bad = Bad(Request.SET_LOG_FD, fds=[disk.rings[0].call_fd])
        expect_refusal(disk, bad, letter)


def test_cp24_rings_inside_the_log(victim: Target) -> None:
    """The log lies in the file of guest memory, over the ring: the guest harms itself alone."""
    with client(victim) as disk:
        region = disk.memory.regions[0]
        size = disk.memory.regions[1].end // PAGE // 8
        os.ftruncate(region.fd, max(size, region.size))
        with DirtyLog(disk.memory, size=size, fd=region.fd) as log:
            disk.start_logging(log, disk.rings)
            disk.submit(header(T_IN), 513)
            disk.barrier()


# ---- 31 ----


def test_cp31_log_fd(victim: Target) -> None:
    """An eventfd is taken, and nothing else is."""
    with client(victim) as disk:
        disk.do(Request.SET_LOG_FD, fds=[disk.rings[0].call_fd])
        check_unchanged(disk)
        with open("/dev/null", "rb") as null:
            expect_error_ack(disk, Bad(Request.SET_LOG_FD, fds=[null.fileno()]))


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        pytest.param(0, 0, id="cp31-size-0"),
        pytest.param(PAGE, WRAP, id="cp31-offset-and-size-wrap"),
        pytest.param(WRAP, PAGE, id="cp31-size-and-offset-wrap"),
        pytest.param(1 << 20, 1 << 63, id="cp31-offset-over-2-63"),
        pytest.param(1 << 20, 1 << 20, id="cp31-beyond-the-file"),
        pytest.param(1 << 40, 0, id="cp31-longer-than-the-file"),
    ],
)
@pytest.mark.parametrize("running", [False, True], ids=["first", "replaced"])
def test_cp31_numbers(victim: Target, size: int, offset: int, running: bool) -> None:
    with client(victim) as disk, DirtyLog(disk.memory, size=1 << 20) as log:
        if running:
            disk.start_logging(log, disk.rings)
        expect_close(disk, Bad(Request.SET_LOG_BASE, wire.LOG.pack(size, offset), [log.fd]))


@pytest.mark.parametrize("short", [1, 100])
def test_cp31_smaller_than_the_highest_address(victim: Target, short: int) -> None:
    with client(victim) as disk, DirtyLog(disk.memory) as whole:
        disk.set_log_base(whole)
        with DirtyLog(disk.memory, size=whole.size - short) as log:
            expect_close(disk, Bad(Request.SET_LOG_BASE, log.pack(), [log.fd]))


@pytest.mark.parametrize("kind", ["null", "directory", "read-only", "pipe"])
def test_cp31_what_is_no_log(victim: Target, tmp_path: str, kind: str) -> None:
    with client(victim) as disk, ExitStack() as stack:
        if kind == "pipe":
            reading, writing = os.pipe()
            stack.callback(os.close, writing)
            fd = reading
        elif kind == "null":
            fd = os.open("/dev/null", os.O_RDWR)
        elif kind == "directory":
            fd = os.open(tmp_path, os.O_RDONLY)
        else:
            path = os.path.join(tmp_path, "log")
            with open(path, "wb") as file:
                file.truncate(1 << 20)
            fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        expect_close(disk, Bad(Request.SET_LOG_BASE, wire.LOG.pack(1 << 20, 0), [fd]))


@LETTERS
def test_cp31_memory_past_the_log(victim: Target, letter: str) -> None:
    """While it is logged, memory that the log has no bits for is not taken."""
    with client(victim) as disk, DirtyLog(disk.memory) as log, Region(1 << 40, 1 << 20) as far:
        packed = wire.single_region(far.pack())
        disk.set_log_base(log)
        disk.add_mem_reg(far)
        disk.rem_mem_reg(far)
        disk.start_logging(log, disk.rings)
        expect_refusal(disk, Bad(Request.ADD_MEM_REG, packed, [far.fd]), letter)


@LETTERS
def test_cp31_logging_with_a_log_that_has_become_too_small(victim: Target, letter: str) -> None:
    with client(victim) as disk, DirtyLog(disk.memory) as log, Region(1 << 40, 1 << 20) as far:
        disk.set_log_base(log)
        disk.add_mem_reg(far)
        expect_refusal(disk, Bad(Request.SET_FEATURES, u64(disk.features | F_LOG_ALL)), letter)


@LETTERS
@pytest.mark.parametrize("address", [1 << 40, WRAP, (1 << 64) - 4])
def test_cp31_used_ring_past_the_log(victim: Target, address: int, letter: str) -> None:
    with client(victim) as disk, DirtyLog(disk.memory) as log:
        disk.start_logging(log, disk.rings)
        expect_refusal(disk, logged_addr(0, disk.ring, address), letter)


@LETTERS
def test_cp31_unknown_flags_of_a_ring(victim: Target, letter: str) -> None:
    with client(victim) as disk:
        expect_refusal(disk, logged_addr(0, disk.ring, disk.ring.used, flags=3), letter)


def test_cp31_log_truncated(victim: Target) -> None:
    """Touching it is SIGBUS: the rings break, and a new log and a new start mend them."""
    with client(victim) as disk:
        with DirtyLog(disk.memory) as log:
            disk.start_logging(log, disk.rings)
            check_serves(disk)
            os.ftruncate(log.fd, 0)
            disk.submit(header(T_IN), 513)
            disk.ring.wait_broken()
            disk.barrier()
        with DirtyLog(disk.memory) as log:
            disk.get_vring_base(0)
            disk.set_log_base(log)
            disk.ring.reset()
            disk.start_ring(0, disk.ring)
            check_serves(disk)


# ---- 32 ----


def test_cp32_toggled_a_thousand_times(victim: Target) -> None:
    with client(victim, queues=SPARE + 1) as disk, DirtyLog(disk.memory) as log:
        disk.set_log_base(log)
        pending = submit_slow(disk)
        off = disk.features
        for n in range(1000):
            disk.set_features(off if n % 2 else off | F_LOG_ALL)
        for request in pending:
            assert disk.finish(request).status == 0
        check_unchanged(disk)


def test_cp32_replaced_while_written(victim: Target) -> None:
    """What completes after the reply is in the new log; nothing is lost in between."""
    with client(victim) as disk, DirtyLog(disk.memory) as first, DirtyLog(disk.memory) as second:
        disk.start_logging(first, disk.rings)
        logs = (first, second)
        for n in range(100):
            pending = disk.submit(header(T_IN, n), 8 * 512 + 1)
            disk.set_log_base(logs[n % 2])
            found = disk.finish(pending)
            assert found.status == 0
            disk.barrier()
            logged = first.take() | second.take()
            assert pages(*pending.writable) <= logged
            assert first.stray() == second.stray() == 0


def test_cp32_log_without_a_base(victim: Target) -> None:
    """LOG_ALL alone logs nothing: QEMU gives the log after it where a device starts late."""
    with client(victim) as disk:
        disk.set_features(disk.features | F_LOG_ALL)
        check_serves(disk)
        with DirtyLog(disk.memory) as log:
            disk.set_log_base(log)
            check_serves(disk)
            disk.barrier()
            assert log.take()


def test_cp32_a_ring_breaks_alone_with_logging_on(victim: Target) -> None:
    with client(victim, queues=SPARE + 1) as disk, DirtyLog(disk.memory) as log:
        disk.start_logging(log, disk.rings)
        disk.ring.set_desc(0, 1 << 50, 16)
        disk.ring.offer(0)
        disk.ring.kick()
        expect_broken(disk)


def test_logging_is_offered(victim: Target) -> None:
    with Session(victim.socket) as session:
        assert session.get_features() & F_LOG_ALL
        assert not FEATURES & F_LOG_ALL  # clients of other tests do without
        assert session.get_protocol_features() & Protocol.LOG_SHMFD
