"""Catalogue, control plane 25-27: where a ring begins and stops, its kicks and calls."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress

import pytest

from tests.frontend import wire
from tests.frontend.blk import S_OK, SECTOR, T_IN, header
from tests.frontend.ring import split
from tests.frontend.wire import Request, u64, vring_state

from .target import (
    QUEUES,
    SPARE,
    Bad,
    Target,
    check_serves,
    check_unchanged,
    expect_broken,
    expect_refusal,
    start_spare,
    submit_slow,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
EVENTFD_MAX = (1 << 64) - 2


def eventfd(stack: ExitStack, flags: int) -> int:
    fd = os.eventfd(0, flags)
    stack.callback(os.close, fd)
    return fd


# ---- 25: the base ----


@LETTERS
@pytest.mark.parametrize(
    "base", [0x10000, 0x18000, 0x80000000, 0xFFFFFFFF], ids="cp25-base-{:#x}".format
)
def test_cp25_base_over_65535(victim: Target, base: int, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_VRING_BASE, vring_state(SPARE, base)), letter)


@pytest.mark.parametrize("base", [1, 63, 64, 0x7FFF, 0x8000, 0xFFFF], ids="cp25-base-{:#x}".format)
def test_cp25_base_is_legal(victim: Target, base: int) -> None:
    """A split ring's index has 16 bits, bit 15 included: no wrap counter there."""
    with victim.client(base=base) as disk:
        check_serves(disk)
        assert disk.get_vring_base(0) == (base + 2) & 0xFFFF


@pytest.mark.parametrize("ahead", [65, 1000, 0x8000, 0xFFFF], ids="cp25-avail-ahead-by-{}".format)
def test_cp25_avail_too_far_ahead_of_the_base(victim: Target, ahead: int) -> None:
    with victim.client() as disk:
        ring = split(disk.new_ring())
        ring.avail_idx = ahead
        start_spare(disk, ring)
        ring.kick()
        ring.wait_broken()
        assert ring.used_idx == 0
        check_serves(disk, 0)


# ---- 26: GET_VRING_BASE ----


def test_cp26_base_asked_twice(victim: Target) -> None:
    with victim.client() as disk:
        check_serves(disk)
        assert disk.get_vring_base(0) == 2
        assert disk.get_vring_base(0) == 2


def test_cp26_base_of_a_ring_never_started(victim: Target) -> None:
    with victim.client() as disk:
        assert disk.get_vring_base(SPARE) == 0
        disk.do(Request.SET_VRING_BASE, vring_state(SPARE, 77))
        assert disk.get_vring_base(SPARE) == 77
        check_unchanged(disk)


def test_cp26_base_with_io_in_flight(victim: Target) -> None:
    """The answer comes when everything popped has completed: next index = used index."""
    with victim.client() as disk:
        pending = submit_slow(disk)
        base = disk.get_vring_base(0)
        assert disk.ring.used_idx == base
        for request in pending[:base]:
            done = disk.finish(request)
            assert (done.status, done.used) == (S_OK, 1)
        # What was not popped is served when the ring is started again where it stopped.
        disk.start_ring(0, disk.ring, base=base)
        disk.ring.kick()
        for request in pending[base:]:
            assert disk.finish(request).status == S_OK
        check_serves(disk)


def test_cp26_fds_of_a_ring_started_and_stopped(victim: Target) -> None:
    """The kick fd is given back with the answer, a hundred times on one connection."""
    with victim.client() as disk:
        check_serves(disk)
        base = disk.get_vring_base(0)
        stopped = victim.server.fds()
        for _ in range(100):
            disk.set_vring_kick(0, disk.ring)
            check_serves(disk)
            base = (base + 2) & 0xFFFF
            assert disk.get_vring_base(0) == base
        assert victim.server.fds() == stopped
        disk.set_vring_kick(0, disk.ring)
        assert victim.server.fds() != stopped


def test_cp26_stopped_ring_takes_nothing(victim: Target) -> None:
    with victim.client() as disk:
        base = disk.get_vring_base(0)
        pending = disk.submit(header(T_IN), SECTOR + 1)
        disk.barrier()
        assert disk.ring.used_idx == base
        disk.start_ring(0, disk.ring, base=base)
        disk.ring.kick()
        assert disk.finish(pending).status == S_OK


def test_cp26_disabled_ring_takes_nothing(victim: Target) -> None:
    with victim.client() as disk:
        disk.enable(0, False)
        pending = disk.submit(header(T_IN), SECTOR + 1)
        disk.barrier()
        assert disk.ring.used_idx == 0
        disk.enable(0)
        assert disk.finish(pending).status == S_OK


# ---- 27: kicks and calls ----


def test_cp27_kick_resent_while_running(victim: Target) -> None:
    with victim.client() as disk, ExitStack() as stack:
        check_serves(disk)
        old = disk.ring.kick_fd
        stack.callback(os.close, old)
        disk.ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for _ in range(3):
            disk.set_vring_kick(0, disk.ring)
            check_serves(disk)
        os.eventfd_write(old, 1)
        check_serves(disk)


def test_cp27_kick_resent_with_work_pending(victim: Target) -> None:
    """A new kick fd never written: work made available before must not be forgotten."""
    with victim.client() as disk, ExitStack() as stack:
        old = disk.ring.kick_fd
        stack.callback(os.close, old)
        pending = disk.submit(header(T_IN), SECTOR + 1, kick=False)
        disk.ring.kick_fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        disk.set_vring_kick(0, disk.ring)
        assert disk.finish(pending).status == S_OK


def test_cp27_kick_fd_closed_by_the_peer(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        ring = disk.rings[SPARE]
        os.close(ring.kick_fd)
        ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        check_serves(disk, 0)
        disk.get_vring_base(SPARE)
        disk.start_ring(SPARE, ring)
        check_serves(disk, SPARE)


def test_cp27_kick_counter_at_its_maximum(victim: Target) -> None:
    """A full counter starts the ring as any count does; whoever fills it may have its later writes
    refused by the kernel, which is the peer's loss until it sends another kick fd."""
    with victim.client() as disk, ExitStack() as stack:
        ring = disk.new_ring()
        disk.rings.append(ring)
        pending = disk.submit(header(T_IN), SECTOR + 1, queue=SPARE, kick=False)
        ring.kick(EVENTFD_MAX)
        disk.start_ring(SPARE, ring)
        assert disk.finish(pending).status == S_OK
        stack.callback(os.close, ring.kick_fd)
        ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        disk.set_vring_kick(SPARE, ring)
        check_serves(disk, SPARE)


def test_cp27_blocking_kick_fd(victim: Target) -> None:
    """A kick fd without O_NONBLOCK, and a front-end that reads it away itself."""
    with victim.client() as disk, ExitStack() as stack:
        stack.callback(os.close, disk.ring.kick_fd)
        disk.ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
        disk.set_vring_kick(0, disk.ring)
        for _ in range(200):
            os.eventfd_write(disk.ring.kick_fd, 1)
            os.set_blocking(disk.ring.kick_fd, False)
            with suppress(BlockingIOError):
                os.eventfd_read(disk.ring.kick_fd)
            os.set_blocking(disk.ring.kick_fd, True)
        check_serves(disk)


@pytest.mark.parametrize("flags", [os.EFD_CLOEXEC, os.EFD_CLOEXEC | os.EFD_NONBLOCK])
def test_cp27_call_fd_full(victim: Target, flags: int) -> None:
    """An eventfd at its maximum blocks its writer: the iothread must not be that writer."""
    with victim.client(queues=QUEUES) as disk, ExitStack() as stack:
        full = eventfd(stack, flags)
        os.eventfd_write(full, EVENTFD_MAX)
        disk.set_vring_call(0, full)
        pending = disk.submit(header(T_IN), SECTOR + 1)
        deadline = time.monotonic() + wire.TIMEOUT
        while disk.ring.used_idx == 0:
            check_serves(disk, SPARE)
            assert time.monotonic() < deadline, "no completion: the server hangs in its call"
        assert disk.finish(pending).status == S_OK
        check_serves(disk, SPARE)
        disk.set_vring_call(0, disk.ring.call_fd)
        check_serves(disk, 0)


def test_cp27_no_call_fd(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        disk.do(Request.SET_VRING_CALL, u64(wire.NO_FD))
        pending = disk.submit(header(T_IN), SECTOR + 1)
        deadline = time.monotonic() + wire.TIMEOUT
        while disk.ring.used_idx == 0:
            check_serves(disk, SPARE)
            assert time.monotonic() < deadline
        assert disk.finish(pending).status == S_OK


def test_cp27_no_kick_fd_starts_at_once(victim: Target) -> None:
    """Bit 8 of SET_VRING_KICK: the back-end must poll (vhost-user, VHOST_USER_SET_VRING_KICK)."""
    with victim.client() as disk:
        ring = disk.new_ring()
        disk.rings.append(ring)
        disk.configure_ring(SPARE, ring)
        disk.do(Request.SET_VRING_KICK, u64(SPARE | wire.NO_FD))
        disk.enable(SPARE)
        pending = disk.submit(header(T_IN), SECTOR + 1, queue=SPARE, kick=False)
        assert disk.finish(pending).status == S_OK


def test_cp27_err_fd_full(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk, ExitStack() as stack:
        full = eventfd(stack, os.EFD_CLOEXEC)
        os.eventfd_write(full, EVENTFD_MAX)
        disk.do(Request.SET_VRING_ERR, u64(0), [full])
        disk.ring.avail_idx = 1000
        disk.ring.kick()
        disk.barrier()
        check_serves(disk, SPARE)


def test_cp27_broken_ring_comes_back(victim: Target) -> None:
    """A broken ring is only that: stopped, set up and started again, it serves."""
    with victim.client(queues=QUEUES) as disk:
        disk.ring.avail_idx = 1000
        disk.ring.kick()
        expect_broken(disk)
        disk.get_vring_base(0)
        disk.ring.reset()
        disk.start_ring(0, disk.ring)
        check_serves(disk)
