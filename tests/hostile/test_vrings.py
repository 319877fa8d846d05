"""Catalogue, control plane 19-23: indexes, sizes and addresses of rings, order of messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.frontend import wire
from tests.frontend.blk import FEATURES, S_OK, SECTOR, T_IN, BlkClient, header
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.session import F_PROTOCOL_FEATURES, Session
from tests.frontend.wire import Request, u64, vring_addr, vring_state

from .target import (
    QUEUES,
    SPARE,
    Bad,
    Target,
    case,
    check_serves,
    check_unchanged,
    expect_close,
    expect_refusal,
    spare_ring,
    start_spare,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
Build = Callable[[BlkClient, ExitStack], Bad]


def eventfd(stack: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


# ---- 19: indexes out of range ----


def address_of(index: int) -> Build:
    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        ring = spare_ring(disk, stack)
        user = disk.memory.user_addr
        payload = vring_addr(index, user(ring.desc), user(ring.used), user(ring.avail))
        return Bad(Request.SET_VRING_ADDR, payload)

    return build


def state_of(request: Request, index: int, num: int) -> Build:
    return lambda disk, stack: Bad(request, vring_state(index, num))


def fd_of(request: Request, value: int, *, with_fd: bool = True) -> Build:
    return lambda disk, stack: Bad(request, u64(value), [eventfd(stack)] if with_fd else [])


INDEXES = [QUEUES, 0xFF, 0x10000, 0x80000000, 0xFFFFFFFF]
FD_REQUESTS = [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]


@LETTERS
@pytest.mark.parametrize(
    "build",
    [
        *(case(f"cp19-num-{n:#x}", state_of(Request.SET_VRING_NUM, n, 64)) for n in INDEXES),
        *(case(f"cp19-base-{n:#x}", state_of(Request.SET_VRING_BASE, n, 0)) for n in INDEXES),
        *(case(f"cp19-get-base-{n:#x}", state_of(Request.GET_VRING_BASE, n, 0)) for n in INDEXES),
        *(case(f"cp19-enable-{n:#x}", state_of(Request.SET_VRING_ENABLE, n, 1)) for n in INDEXES),
        *(case(f"cp19-addr-{n:#x}", address_of(n)) for n in INDEXES),
        *(
            case(f"cp19-{r.name[10:].lower()}-{n:#x}", fd_of(r, n))
            for r in FD_REQUESTS
            # Bit 8 says that no fd comes: these values are row 9's.
            for n in [QUEUES, 0xFF, 0x10000, 1 << 32, 1 << 63]
        ),
        *(
            case(f"cp19-{r.name[10:].lower()}-{n:#x}-no-fd", fd_of(r, n, with_fd=False))
            for r in FD_REQUESTS
            for n in [wire.NO_FD | QUEUES, wire.NO_FD | 0xFF, wire.NO_FD | 0x200]
        ),
    ],
)
def test_cp19_index(victim: Target, build: Build, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        expect_refusal(disk, build(disk, stack), letter)


# ---- 20: sizes ----


@LETTERS
@pytest.mark.parametrize(
    "num",
    [
        pytest.param(0, id="cp20-num-0"),
        pytest.param(3, id="cp20-num-not-power-of-two"),
        pytest.param(100, id="cp20-num-100"),
        pytest.param(32767, id="cp20-num-32767"),
        pytest.param(32769, id="cp20-num-32769"),
        pytest.param(65536, id="cp20-num-65536"),
        pytest.param(0x80000000, id="cp20-num-2-31"),
        pytest.param(0xFFFFFFFF, id="cp20-num-2-32-minus-1"),
    ],
)
def test_cp20_num(victim: Target, num: int, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_VRING_NUM, vring_state(SPARE, num)), letter)


@LETTERS
def test_cp20_num_changed_while_running(victim: Target, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_VRING_NUM, vring_state(0, 32)), letter)


@LETTERS
def test_cp20_base_changed_while_running(victim: Target, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_VRING_BASE, vring_state(0, 7)), letter)


@LETTERS
def test_cp20_addr_changed_while_running(victim: Target, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        expect_refusal(disk, address_of(0)(disk, stack), letter)


@pytest.mark.parametrize("size", [1, 2, 32768], ids="cp20-size-{}-is-legal".format)
def test_cp20_extreme_sizes(victim: Target, size: int) -> None:
    with victim.client() as disk:
        ring = start_spare(disk, disk.new_ring(size))
        if size == 1:
            # Room for a single descriptor: only an indirect table carries a request.
            pending = disk.submit(header(T_IN), SECTOR + 1, queue=SPARE, indirect=True)
            assert disk.finish(pending).status == S_OK
        elif size == 2:
            pending = disk.submit(header(T_IN), SECTOR + 1, queue=SPARE)
            assert disk.finish(pending).status == S_OK
        else:
            check_serves(disk, SPARE)
        assert ring.size == size


# ---- 21, 22: addresses ----


def placed(*, desc: int = 0, avail: int = 0, used: int = 0, size: int = 64) -> Build:
    """SET_VRING_ADDR with a good ring's addresses shifted."""

    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        ring = spare_ring(disk, stack, size)
        user = disk.memory.user_addr
        payload = vring_addr(
            SPARE, user(ring.desc) + desc, user(ring.used) + used, user(ring.avail) + avail
        )
        return Bad(Request.SET_VRING_ADDR, payload)

    return build


def at(which: str, where: Callable[[Region], int], *, region: int = 0) -> Build:
    """SET_VRING_ADDR with one part of a good ring at a front-end address of one's choice."""

    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        ring = spare_ring(disk, stack)
        user = disk.memory.user_addr
        parts = {"desc": user(ring.desc), "used": user(ring.used), "avail": user(ring.avail)}
        parts[which] = where(disk.memory.regions[region])
        payload = vring_addr(SPARE, parts["desc"], parts["used"], parts["avail"])
        return Bad(Request.SET_VRING_ADDR, payload)

    return build


def same(first: str, second: str, shift: int = 0) -> Build:
    """SET_VRING_ADDR with two parts of a ring over each other."""

    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        ring = spare_ring(disk, stack)
        user = disk.memory.user_addr
        parts = {"desc": user(ring.desc), "used": user(ring.used), "avail": user(ring.avail)}
        parts[second] = parts[first] + shift
        payload = vring_addr(SPARE, parts["desc"], parts["used"], parts["avail"])
        return Bad(Request.SET_VRING_ADDR, payload)

    return build


DESC_BYTES = 16 * 64
AVAIL_BYTES = 6 + 2 * 64
USED_BYTES = 6 + 8 * 64


def user_end(region: Region) -> int:
    return region.user_addr + region.size


@LETTERS
@pytest.mark.parametrize(
    "build",
    [
        *(case(f"cp21-desc-plus-{n}", placed(desc=n)) for n in (1, 2, 4, 8)),
        case("cp21-avail-plus-1", placed(avail=1)),
        *(case(f"cp21-used-plus-{n}", placed(used=n)) for n in (1, 2)),
        case("cp22-desc-tail-outside", at("desc", lambda r: user_end(r) - DESC_BYTES + 16)),
        case("cp22-avail-tail-outside", at("avail", lambda r: user_end(r) - AVAIL_BYTES + 2)),
        case("cp22-used-tail-outside", at("used", lambda r: user_end(r) - (USED_BYTES & ~3) + 4)),
        case("cp22-desc-last-bytes", at("desc", lambda r: user_end(r) - 16)),
        case("cp22-desc-at-the-end", at("desc", user_end)),
        case("cp22-used-in-a-hole", at("used", lambda r: user_end(r) + (1 << 20))),
        case("cp22-avail-before-memory", at("avail", lambda r: r.user_addr - 4096)),
        case("cp22-desc-address-0", at("desc", lambda r: 0)),
        case("cp22-used-address-0", at("used", lambda r: 0)),
        case("cp22-desc-wraps", at("desc", lambda r: (1 << 64) - 16)),
        case("cp22-avail-wraps", at("avail", lambda r: (1 << 64) - 2)),
        case("cp22-used-wraps", at("used", lambda r: (1 << 64) - 4)),
        case("cp22-desc-is-a-guest-address", at("desc", lambda r: r.guest_addr + 4096)),
        case("cp22-avail-over-desc", same("desc", "avail")),
        case("cp22-used-over-desc", same("desc", "used")),
        case("cp22-used-over-avail", same("avail", "used", -2)),
        case("cp22-used-over-the-end-of-desc", same("desc", "used", DESC_BYTES - 4)),
        case("cp22-avail-over-the-end-of-used", same("used", "avail", USED_BYTES - 2)),
    ],
)
def test_cp21_cp22_addresses(victim: Target, build: Build, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        disk.do(Request.SET_VRING_NUM, vring_state(SPARE, 64))
        expect_refusal(disk, build(disk, stack), letter)


def test_cp22_tail_outside_by_a_later_num(victim: Target) -> None:
    """Addresses good for a ring of 64, then NUM 32768: refused there or at the start."""
    with victim.client() as disk, ExitStack() as stack:
        disk.do(Request.SET_VRING_NUM, vring_state(SPARE, 64))
        last = disk.memory.regions[0]
        ring = spare_ring(disk, stack)
        user = disk.memory.user_addr
        payload = vring_addr(SPARE, user_end(last) - DESC_BYTES, user(ring.used), user(ring.avail))
        disk.do(Request.SET_VRING_ADDR, payload)
        acks = [
            disk.wire.ack_of(Request.SET_VRING_NUM, vring_state(SPARE, 32768)),
            disk.wire.ack_of(Request.SET_VRING_KICK, u64(SPARE), [ring.kick_fd]),
        ]
        # Where NUM was refused, the ring of 64 is in order and may start.
        assert any(acks)
        disk.get_vring_base(SPARE)
        check_unchanged(disk)


def test_cp22_ring_over_two_regions(victim: Target) -> None:
    """A ring must lie in one region: its two halves are apart in the server's own address space."""
    low = Region(1 << 31, 1 << 20)
    memory = GuestMemory(low, Region(low.end, 1 << 20))
    with victim.client(memory=memory) as disk, ExitStack() as stack:
        ring = spare_ring(disk, stack)
        disk.do(Request.SET_VRING_NUM, vring_state(SPARE, 64))
        user = memory.user_addr
        payload = vring_addr(SPARE, user_end(low) - 64, user(ring.used), user(ring.avail))
        expect_refusal(disk, Bad(Request.SET_VRING_ADDR, payload), "ack")


def test_cp22_ring_in_the_last_bytes_is_legal(victim: Target) -> None:
    with victim.client() as disk:
        ring = disk.new_ring()
        ring.desc = disk.memory.regions[0].end - DESC_BYTES
        ring.reset()
        start_spare(disk, ring)
        check_serves(disk, SPARE)


# ---- 23: order ----


@LETTERS
def test_cp23_addr_before_mem_table(victim: Target, letter: str) -> None:
    with victim.connect() as connection:
        session = Session(connection)
        session.negotiate(FEATURES)
        payload = vring_addr(0, 0x1000, 0x2000, 0x3000)
        if letter == "ack":
            assert connection.ack_of(Request.SET_VRING_ADDR, payload) != 0
            assert session.get_features()
        else:
            connection.send(Request.SET_VRING_ADDR, payload)
            connection.wait_closed()


@LETTERS
@pytest.mark.parametrize("missing", ["addr", "num", "both"], ids="cp23-kick-without-{}".format)
def test_cp23_kick_too_early(victim: Target, missing: str, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        ring = spare_ring(disk, stack)
        if missing == "num":
            disk.set_vring_addr(SPARE, ring)
        elif missing == "addr":
            disk.do(Request.SET_VRING_NUM, vring_state(SPARE, 64))
        expect_refusal(disk, Bad(Request.SET_VRING_KICK, u64(SPARE), [ring.kick_fd]), letter)


def test_cp23_enable_without_protocol_features(victim: Target) -> None:
    with victim.client(features=FEATURES & ~F_PROTOCOL_FEATURES) as disk:
        check_serves(disk)
        expect_close(disk, Bad(Request.SET_VRING_ENABLE, vring_state(0, 1)))


@LETTERS
@pytest.mark.parametrize("num", [2, 0xFF, 0xFFFFFFFF], ids="cp23-enable-{:#x}".format)
def test_cp23_enable_value(victim: Target, num: int, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_VRING_ENABLE, vring_state(0, num)), letter)
