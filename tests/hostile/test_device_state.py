"""Catalogue, control plane 24, 28-30, 36, 37, 39, 41: features, config, status, connections."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from tests.frontend import wire
from tests.frontend.blk import (
    CONFIG_SIZE,
    F_CONFIG_WCE,
    FEATURES,
    S_OK,
    S_UNSET,
    SECTOR,
    T_IN,
    WRITEBACK_OFFSET,
    check_healthy,
    header,
)
from tests.frontend.session import (
    F_EVENT_IDX,
    F_PROTOCOL_FEATURES,
    F_VERSION_1,
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    Session,
)
from tests.frontend.wire import Closed, Request, Wire, u64

from .target import (
    QUEUES,
    Bad,
    Target,
    check_serves,
    check_unchanged,
    expect_refusal,
    submit_slow,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])


# ---- 24: offered, and not agreed ----


def with_fd(request: Request, payload: bytes) -> Callable[[ExitStack], Bad]:
    def build(stack: ExitStack) -> Bad:
        fd = os.memfd_create("shared", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, 1 << 20)
        return Bad(request, payload, [fd])

    return build


NOT_AGREED: dict[str, Callable[[ExitStack], Bad]] = {
    "cp24-get-inflight-fd": lambda stack: Bad(
        Request.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, 1, 64)
    ),
    "cp24-set-inflight-fd": with_fd(Request.SET_INFLIGHT_FD, wire.INFLIGHT.pack(4096, 0, 1, 64)),
}


@LETTERS
@pytest.mark.parametrize("name", NOT_AGREED)
def test_cp24_not_agreed(victim: Target, name: str, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        expect_refusal(disk, NOT_AGREED[name](stack), letter)


# ---- 28, 29: features ----


@LETTERS
@pytest.mark.parametrize(
    "bit",
    [0, 3, 7, 15, 16, 17, 31, 38, 40, 63],
    ids="cp28-unoffered-bit-{}".format,
)
def test_cp28_unoffered_feature(victim: Target, bit: int, letter: str) -> None:
    with Session(victim.socket) as session:
        offered = session.get_features()
        assert not offered & 1 << bit, f"feature {bit} is offered: this case is stale"
        session.negotiate(FEATURES)
        bad = u64((offered & FEATURES) | 1 << bit)
        if letter == "ack":
            assert session.wire.ack_of(Request.SET_FEATURES, bad) != 0
            session.set_features(offered & FEATURES)
        else:
            session.wire.send(Request.SET_FEATURES, bad)
            session.wire.wait_closed()


@LETTERS
def test_cp28_changed_while_running(victim: Target, letter: str) -> None:
    with victim.client() as disk:
        bad = Bad(Request.SET_FEATURES, u64(disk.features & ~F_EVENT_IDX))
        expect_refusal(disk, bad, letter)


def test_cp28_same_again_while_running(victim: Target) -> None:
    """Legal: QEMU sends them once for each pair of a card's queues."""
    with victim.client() as disk:
        disk.set_features(disk.features)
        check_unchanged(disk)


@LETTERS
def test_cp28_without_version_1(victim: Target, letter: str) -> None:
    with Session(victim.socket) as session:
        session.negotiate(FEATURES)
        bad = u64(session.features & ~F_VERSION_1)
        if letter == "ack":
            assert session.wire.ack_of(Request.SET_FEATURES, bad) != 0
            session.set_features(session.features)
        else:
            session.wire.send(Request.SET_FEATURES, bad)
            session.wire.wait_closed()


def test_cp28_without_protocol_features(victim: Target) -> None:
    """Legal: without bit 30 the rings are enabled from the start."""
    with victim.client(features=FEATURES & ~F_PROTOCOL_FEATURES) as disk:
        check_serves(disk)


@LETTERS
@pytest.mark.parametrize(
    "bit", [2, 4, 6, 7, 8, 11, 14, 17, 18, 21, 32, 63], ids="cp29-unoffered-bit-{}".format
)
def test_cp29_unoffered_protocol_feature(victim: Target, bit: int, letter: str) -> None:
    with Session(victim.socket) as session:
        session.negotiate(FEATURES)
        offered = session.get_protocol_features()
        assert not offered & 1 << bit, f"protocol feature {bit} is offered: this case is stale"
        bad = u64(session.protocol | 1 << bit)
        if letter == "ack":
            assert session.wire.ack_of(Request.SET_PROTOCOL_FEATURES, bad) != 0
            assert session.get_queue_num() == QUEUES
        else:
            session.wire.send(Request.SET_PROTOCOL_FEATURES, bad)
            session.wire.wait_closed()


# ---- 30: owners and resets ----


@LETTERS
def test_cp30_set_owner_twice(victim: Target, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(Request.SET_OWNER), letter)


def test_cp30_reset_owner_in_mid_io(victim: Target) -> None:
    """RESET_OWNER disables the rings and no more: what was popped completes, nothing else is
    popped, and enabled again they go on where they were."""
    with victim.client() as disk:
        pending = submit_slow(disk)
        disk.do(Request.RESET_OWNER)
        later = disk.submit(header(T_IN), SECTOR + 1)
        for _ in range(20):
            disk.barrier()
        assert disk.memory.read(*later.writable) == bytes([S_UNSET]) * (SECTOR + 1)
        disk.enable(0)
        disk.ring.kick()
        for request in [*pending, later]:
            assert disk.finish(request).status == S_OK
        check_serves(disk)


def test_cp30_reset_device_in_mid_io(victim: Target) -> None:
    """After the answer nothing is written into guest memory, and all can be set up anew."""
    with victim.client() as disk:
        submit_slow(disk)
        disk.do(Request.RESET_DEVICE)
        low = disk.memory.regions[0]
        low.map[:] = b"\xaa" * low.size
        for _ in range(20):
            disk.barrier()
        assert low.map[:].count(b"\xaa") == low.size
        assert disk.get_status() == 0
        disk.set_features(disk.features)
        disk.share(disk.memory)
        disk.ring.reset()
        disk.start_ring(0, disk.ring)
        disk.driver_ok()
        check_serves(disk)


def test_cp30_reset_device_before_anything(victim: Target) -> None:
    with Session(victim.socket) as session:
        session.negotiate(FEATURES)
        session.do(Request.RESET_DEVICE)
        assert session.get_status() == 0


def test_cp30_reset_device_twenty_times(victim: Target) -> None:
    with victim.client() as disk:
        for _ in range(20):
            for request in submit_slow(disk, 4):
                disk.release(request)
            disk.do(Request.RESET_DEVICE)
            disk.set_features(disk.features)
            disk.share(disk.memory)
            disk.ring.reset()
            disk.start_ring(0, disk.ring)
        check_serves(disk)


# ---- 36: config space ----


@pytest.mark.parametrize(
    ("offset", "size", "data"),
    [
        pytest.param(0xFFFFFFF0, 0x20, 0x20, id="cp36-get-wraps"),
        pytest.param(0xFFFFFFFF, 1, 1, id="cp36-get-last-offset"),
        pytest.param(0, 0, 0, id="cp36-get-size-0"),
        pytest.param(256, 1, 1, id="cp36-get-behind-the-end"),
        pytest.param(255, 2, 2, id="cp36-get-over-the-end"),
        pytest.param(0, 257, 257, id="cp36-get-257"),
        pytest.param(0, 4084, 4084, id="cp36-get-4084"),
        pytest.param(0, 0xFFFFFFFF, 8, id="cp36-get-size-2-32-minus-1"),
        pytest.param(0, 16, 8, id="cp36-get-less-data-than-size"),
        pytest.param(0, 8, 16, id="cp36-get-more-data-than-size"),
    ],
)
def test_cp36_get_config(victim: Target, offset: int, size: int, data: int) -> None:
    """Refused by a reply whose payload is empty (VHOST_USER_GET_CONFIG)."""
    with victim.client() as disk:
        disk.wire.send(Request.GET_CONFIG, wire.config(offset, bytes(data), size=size))
        assert disk.wire.reply_to(Request.GET_CONFIG).payload == b""
        assert len(disk.get_config(0, CONFIG_SIZE)) == CONFIG_SIZE
        check_unchanged(disk)


@LETTERS
@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(wire.config(0, u64(1 << 40)), id="cp36-set-capacity"),
        pytest.param(wire.config(12, bytes(4)), id="cp36-set-seg-max"),
        pytest.param(wire.config(34, b"\xff\0"), id="cp36-set-num-queues"),
        pytest.param(wire.config(WRITEBACK_OFFSET - 1, b"\0\0"), id="cp36-set-field-before"),
        pytest.param(wire.config(WRITEBACK_OFFSET, b"\1\1"), id="cp36-set-field-behind"),
        pytest.param(wire.config(0, bytes(CONFIG_SIZE)), id="cp36-set-everything"),
        pytest.param(wire.config(256, b"\1"), id="cp36-set-behind-the-end"),
        pytest.param(wire.config(255, b"\1\1"), id="cp36-set-over-the-end"),
        pytest.param(wire.config(0xFFFFFFF0, bytes(0x20)), id="cp36-set-wraps"),
        pytest.param(wire.config(WRITEBACK_OFFSET, b""), id="cp36-set-size-0"),
        pytest.param(wire.config(WRITEBACK_OFFSET, b"\1", size=2), id="cp36-set-less-data"),
        pytest.param(wire.config(WRITEBACK_OFFSET, b"\1\1", size=1), id="cp36-set-more-data"),
        pytest.param(
            wire.config(WRITEBACK_OFFSET, b"\1", size=0xFFFFFFFF), id="cp36-set-size-2-32-minus-1"
        ),
    ],
)
def test_cp36_set_config(victim: Target, payload: bytes, letter: str) -> None:
    with victim.client() as disk:
        before = disk.get_config(0, CONFIG_SIZE)
        expect_refusal(disk, Bad(Request.SET_CONFIG, payload), letter)
        if letter == "ack":
            assert disk.get_config(0, CONFIG_SIZE) == before


@LETTERS
def test_cp36_set_writeback_without_config_wce(victim: Target, letter: str) -> None:
    with victim.client(features=FEATURES & ~F_CONFIG_WCE) as disk:
        bad = Bad(Request.SET_CONFIG, wire.config(WRITEBACK_OFFSET, b"\0"))
        expect_refusal(disk, bad, letter)


# ---- 37: the back-end's channel ----


def test_cp37_channel_replaced(victim: Target) -> None:
    with victim.client() as disk, ExitStack() as stack:
        held = []
        for _ in range(50):
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs:
                disk.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            held.append(victim.server.fds()["socket:"])
        assert held == held[:1] * 50, "a replaced channel stays open"
        check_unchanged(disk)


@pytest.mark.parametrize("how", ["closed", "garbage", "half-a-header", "fds"], ids="cp37-{}".format)
def test_cp37_peer_misuses_the_channel(victim: Target, how: str) -> None:
    ours, theirs = socket.socketpair()
    with victim.client() as disk, ours, theirs:
        disk.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        if how == "closed":
            ours.close()
        elif how == "garbage":
            ours.sendall(random.Random(7).randbytes(5000))
        elif how == "half-a-header":
            ours.sendall(b"\1\0\0")
            ours.close()
        else:
            socket.send_fds(ours, [wire.message(2, u64(0), flags=5)], [disk.ring.call_fd] * 3)
        check_unchanged(disk)


# ---- 39: status ----


def test_cp39_bits_in_qemus_order(victim: Target) -> None:
    """Legal: QEMU sets FEATURES_OK with the features, and the others at the start."""
    with Session(victim.socket) as session:
        session.negotiate(FEATURES)
        session.set_status(STATUS_FEATURES_OK)
        everything = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK
        session.set_status(everything)
        assert session.get_status() == everything


@LETTERS
@pytest.mark.parametrize(
    "status",
    [
        pytest.param(STATUS_ACKNOWLEDGE, id="cp39-bits-cleared"),
        pytest.param(11, id="cp39-driver-ok-cleared"),
        pytest.param(0x10F, id="cp39-over-8-bits"),
        pytest.param(1 << 63, id="cp39-bit-63"),
    ],
)
def test_cp39_status(victim: Target, status: int, letter: str) -> None:
    """The driver must not clear a status bit (virtio 1.3, section 2.1.1); 0 is the reset."""
    with victim.client() as disk:
        assert disk.get_status() == 15
        expect_refusal(disk, Bad(Request.SET_STATUS, u64(status)), letter)
        if letter == "ack":
            assert disk.get_status() == 15


@LETTERS
def test_cp39_driver_ok_without_features_ok(victim: Target, letter: str) -> None:
    """FEATURES_OK comes before DRIVER_OK (virtio 1.3, section 3.1.1)."""
    with Session(victim.socket) as session:
        session.negotiate(FEATURES)
        bad = u64(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK)
        if letter == "ack":
            assert session.wire.ack_of(Request.SET_STATUS, bad) != 0
            assert session.get_status() == 0
        else:
            session.wire.send(Request.SET_STATUS, bad)
            session.wire.wait_closed()


# ---- 41: connections ----


def test_cp41_a_thousand_connections(victim: Target) -> None:
    check_healthy(victim.socket)
    before = victim.server.rss()
    for n in range(1000):
        with victim.connect() as connection:
            if n % 3 == 1:
                connection.send(Request.GET_FEATURES)
            elif n % 3 == 2:
                connection.ask(Request.GET_FEATURES)
    victim.server.check_holdings(victim.socket, victim.baseline)
    grown = victim.server.rss() - before
    assert grown < 8 << 20, f"{grown} bytes of memory left over by 1000 connections"


def test_cp41_two_hundred_whole_sessions(victim: Target) -> None:
    check_healthy(victim.socket)
    before = victim.server.rss()
    for _ in range(200):
        with victim.client() as disk:
            submit_slow(disk, 2)
    victim.server.check_holdings(victim.socket, victim.baseline)
    grown = victim.server.rss() - before
    assert grown < 8 << 20, f"{grown} bytes of memory left over by 200 sessions"


def test_cp41_second_client_on_a_busy_device(victim: Target) -> None:
    """It is turned away or waits; the first is not disturbed, and its successor is served."""
    with victim.client() as disk:
        with victim.connect() as second:
            with suppress(Closed):
                second.send(Request.GET_FEATURES)
            check_unchanged(disk)
        check_unchanged(disk)
    check_healthy(victim.socket)


@pytest.mark.parametrize("speak", [False, True], ids=["silent", "first-byte"])
def test_cp41_half_open_clients(victim: Target, speak: bool) -> None:
    """Two hundred that connect and then say nothing, or a byte: they lock nobody out, the busy
    device goes on, and what the server holds for them is bounded."""
    with victim.client() as disk, ExitStack() as stack:
        for _ in range(200):
            idle = stack.enter_context(Wire.connect(victim.socket))
            if speak:
                with suppress(Closed):
                    idle.send_raw(b"\1")
            disk.barrier()
        check_unchanged(disk)
        assert victim.server.fds()["socket:"] < 100
    if not speak:
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(Wire.connect(victim.socket))
            check_healthy(victim.socket)


def test_cp41_peer_killed_with_io_in_flight(victim: Target) -> None:
    """What was popped completes inside the server; nothing is left behind, 20 times over."""
    for _ in range(20):
        disk = victim.client(queues=QUEUES)
        for queue in range(QUEUES):
            submit_slow(disk, queue=queue)
        disk.close()


def test_cp41_reconnect_finds_what_was_written(victim: Target) -> None:
    data = os.urandom(SECTOR)
    with victim.client() as disk:
        disk.write(5, data)
    with victim.client() as disk:
        done = disk.request(T_IN, 5, room=SECTOR)
        assert (done.status, done.data) == (S_OK, data)
