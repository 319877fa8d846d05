"""Catalogue, control plane 1-10: headers, sizes, ids, features and file descriptors of messages."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest

from tests.frontend import wire
from tests.frontend.blk import FEATURES, BlkClient
from tests.frontend.memory import Region
from tests.frontend.ring import SplitRing
from tests.frontend.session import F_PROTOCOL_FEATURES, PROTOCOL_WANTED, Session
from tests.frontend.wire import (
    NEED_REPLY,
    REPLY,
    VERSION,
    Closed,
    Hung,
    Protocol,
    Request,
    Wire,
    u64,
    vring_addr,
    vring_state,
)

from .target import (
    SPARE,
    Bad,
    Target,
    check_unchanged,
    expect_close,
    expect_error_ack,
    expect_refusal,
    spare_ring,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])


# ---- well-formed messages to spoil ----


def eventfd(stack: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def new_region(disk: BlkClient, stack: ExitStack, at: int = 1 << 40) -> Region:
    region = Region(at, 1 << 16)
    stack.callback(region.close)
    return region


def good_addr(disk: BlkClient, stack: ExitStack) -> bytes:
    ring: SplitRing = spare_ring(disk, stack)
    user = disk.memory.user_addr
    return vring_addr(SPARE, user(ring.desc), user(ring.used), user(ring.avail))


def good_table(disk: BlkClient, stack: ExitStack) -> Bad:
    regions = disk.memory.regions
    return Bad(
        Request.SET_MEM_TABLE,
        wire.mem_table(r.pack() for r in regions),
        [r.fd for r in regions],
    )


def good_add(disk: BlkClient, stack: ExitStack) -> Bad:
    region = new_region(disk, stack)
    return Bad(Request.ADD_MEM_REG, wire.single_region(region.pack()), [region.fd])


def good_rem(disk: BlkClient, stack: ExitStack) -> Bad:
    region = new_region(disk, stack)
    disk.add_mem_reg(region)
    return Bad(Request.REM_MEM_REG, wire.single_region(region.pack()))


def good_channel(disk: BlkClient, stack: ExitStack) -> Bad:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    return Bad(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])


GOOD: dict[Request, Callable[[BlkClient, ExitStack], Bad]] = {
    Request.GET_FEATURES: lambda d, s: Bad(Request.GET_FEATURES),
    Request.SET_FEATURES: lambda d, s: Bad(Request.SET_FEATURES, u64(d.features)),
    Request.SET_OWNER: lambda d, s: Bad(Request.SET_OWNER),
    Request.RESET_OWNER: lambda d, s: Bad(Request.RESET_OWNER),
    Request.SET_MEM_TABLE: good_table,
    Request.SET_VRING_NUM: lambda d, s: Bad(Request.SET_VRING_NUM, vring_state(SPARE, 64)),
    Request.SET_VRING_ADDR: lambda d, s: Bad(Request.SET_VRING_ADDR, good_addr(d, s)),
    Request.SET_VRING_BASE: lambda d, s: Bad(Request.SET_VRING_BASE, vring_state(SPARE, 0)),
    Request.GET_VRING_BASE: lambda d, s: Bad(Request.GET_VRING_BASE, vring_state(SPARE, 0)),
    Request.SET_VRING_KICK: lambda d, s: Bad(Request.SET_VRING_KICK, u64(SPARE), [eventfd(s)]),
    Request.SET_VRING_CALL: lambda d, s: Bad(Request.SET_VRING_CALL, u64(SPARE), [eventfd(s)]),
    Request.SET_VRING_ERR: lambda d, s: Bad(Request.SET_VRING_ERR, u64(SPARE), [eventfd(s)]),
    Request.GET_PROTOCOL_FEATURES: lambda d, s: Bad(Request.GET_PROTOCOL_FEATURES),
    Request.SET_PROTOCOL_FEATURES: lambda d, s: Bad(Request.SET_PROTOCOL_FEATURES, u64(d.protocol)),
    Request.GET_QUEUE_NUM: lambda d, s: Bad(Request.GET_QUEUE_NUM),
    Request.SET_VRING_ENABLE: lambda d, s: Bad(Request.SET_VRING_ENABLE, vring_state(SPARE, 0)),
    Request.SET_BACKEND_REQ_FD: good_channel,
    Request.GET_CONFIG: lambda d, s: Bad(Request.GET_CONFIG, wire.config(0, bytes(8))),
    Request.SET_CONFIG: lambda d, s: Bad(Request.SET_CONFIG, wire.config(32, b"\1")),
    Request.RESET_DEVICE: lambda d, s: Bad(Request.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: lambda d, s: Bad(Request.GET_MAX_MEM_SLOTS),
    Request.ADD_MEM_REG: good_add,
    Request.REM_MEM_REG: good_rem,
    Request.SET_STATUS: lambda d, s: Bad(Request.SET_STATUS, u64(15)),
    Request.GET_STATUS: lambda d, s: Bad(Request.GET_STATUS),
}
TAKES_FDS = {
    Request.SET_MEM_TABLE,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_BACKEND_REQ_FD,
    Request.ADD_MEM_REG,
}


def slug(request: Request) -> str:
    return request.name.lower().replace("_", "-")


def each(cp: str, requests: Sequence[Request]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "request_id", [pytest.param(r, id=f"{cp}-{slug(r)}") for r in requests]
    )


# ---- 1: where a message is cut ----


class DribblingWire(Wire):
    """Sends one byte at a time, each when the server has read the one before."""

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        for i in range(len(data)):
            super().send_raw(data[i : i + 1], fds if i == 0 else ())
            self.wait_read()

    def wait_read(self) -> None:
        deadline = time.monotonic() + wire.TIMEOUT
        unread = bytes(4)
        while struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, unread))[0]:
            if time.monotonic() > deadline:
                raise Hung("the server does not read")
            os.sched_yield()


def test_cp01_byte_by_byte(victim: Target) -> None:
    with BlkClient(DribblingWire.connect(victim.socket), queues=1) as disk:
        check_unchanged(disk)


@pytest.mark.parametrize("count", range(wire.HEADER.size))
def test_cp01_end_of_file_in_the_header(victim: Target, count: int) -> None:
    with victim.client() as disk:
        disk.wire.send_raw(wire.message(Request.SET_FEATURES, u64(0))[:count])
        disk.wire.half_close()
        disk.wire.wait_closed()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_cp01_end_of_file_in_the_payload(victim: Target, count: int) -> None:
    with victim.client() as disk:
        data = wire.message(Request.SET_FEATURES, u64(0))
        disk.wire.send_raw(data[: wire.HEADER.size + count])
        disk.wire.half_close()
        disk.wire.wait_closed()


def test_cp01_end_of_file_in_a_message_with_fds(victim: Target) -> None:
    with victim.client() as disk, ExitStack() as stack:
        bad = good_table(disk, stack)
        disk.wire.send_raw(wire.message(bad.request, bad.payload)[:20], bad.fds)
        disk.wire.half_close()
        disk.wire.wait_closed()


def test_cp01_two_messages_in_one_segment(victim: Target) -> None:
    with victim.client() as disk:
        disk.wire.send_raw(wire.message(Request.GET_QUEUE_NUM) + wire.message(Request.GET_FEATURES))
        assert disk.wire.reply_to(Request.GET_QUEUE_NUM).u64 == SPARE + 1
        assert disk.wire.reply_to(Request.GET_FEATURES).u64
        check_unchanged(disk)


# ---- 2, 4: headers that make the rest of the stream worthless ----


@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY], ids=["plain", "need-reply"])
@pytest.mark.parametrize("size", [4097, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], ids=hex)
def test_cp02_size_over_the_maximum(victim: Target, size: int, flags: int) -> None:
    with victim.client() as disk:
        disk.wire.send(Request.SET_MEM_TABLE, b"", flags=flags, size=size)
        disk.wire.wait_closed()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0, id="cp04-version-0"),
        pytest.param(2, id="cp04-version-2"),
        pytest.param(3, id="cp04-version-3"),
        pytest.param(VERSION | REPLY, id="cp04-reply-bit"),
        pytest.param(VERSION | REPLY | NEED_REPLY, id="cp04-reply-and-need-reply"),
        pytest.param(VERSION | 0x10, id="cp04-reserved-bit-4"),
        pytest.param(VERSION | NEED_REPLY | 0x20, id="cp04-reserved-bit-5-need-reply"),
        pytest.param(VERSION | 0x80000000, id="cp04-reserved-bit-31"),
    ],
)
def test_cp04_flags(victim: Target, flags: int) -> None:
    with victim.client() as disk:
        disk.wire.send(Request.SET_VRING_NUM, vring_state(SPARE, 64), flags=flags)
        disk.wire.wait_closed()


# ---- 3: sizes that are not the message's ----


@LETTERS
@each("cp03", list(GOOD))
def test_cp03_too_large(victim: Target, request_id: Request, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        extra = b"\0" if request_id in (Request.SET_CONFIG, Request.GET_CONFIG) else bytes(8)
        if request_id == Request.GET_CONFIG:
            # Its refusal has a form of its own: a reply without payload (row 36).
            disk.wire.send(request_id, good.payload + extra)
            try:
                assert disk.wire.reply_to(request_id).payload == b""
            except Closed:
                return
            check_unchanged(disk)
            return
        expect_refusal(disk, Bad(request_id, good.payload + extra, good.fds), letter)


@LETTERS
@pytest.mark.parametrize("keep", ["one-less", "empty"])
@each("cp03", [r for r in GOOD if r not in (Request.GET_CONFIG,)])
def test_cp03_too_small(victim: Target, request_id: Request, keep: str, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        if not good.payload:
            good = Bad(request_id, b"\0", good.fds)
            expect_refusal(disk, good, letter)
            return
        payload = good.payload[:-1] if keep == "one-less" else b""
        expect_refusal(disk, Bad(request_id, payload, good.fds), letter)


# ---- 5, 6: requests that do not exist, or not for us ----


@LETTERS
@pytest.mark.parametrize(
    "number", [0, 23, 26, 27, 33, 41, 44, 255, 1000, 0x80000001, 0xFFFFFFFF], ids="cp05-{}".format
)
def test_cp05_unknown_request(victim: Target, number: int, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, Bad(number, u64(0)), letter)


NEEDS = {
    Request.SET_BACKEND_REQ_FD: Protocol.BACKEND_REQ,
    Request.SET_CONFIG: Protocol.CONFIG,
    Request.RESET_DEVICE: Protocol.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS: Protocol.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: Protocol.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: Protocol.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: Protocol.STATUS,
    Request.GET_STATUS: Protocol.STATUS,
    Request.GET_QUEUE_NUM: Protocol.MQ,
}


@LETTERS
@each("cp06", list(NEEDS))
def test_cp06_feature_not_negotiated(victim: Target, request_id: Request, letter: str) -> None:
    protocol = PROTOCOL_WANTED & ~NEEDS[request_id]
    with victim.client(protocol=protocol) as disk, ExitStack() as stack:
        if request_id == Request.REM_MEM_REG:
            bad = Bad(request_id, wire.single_region(disk.memory.regions[1].pack()))
        else:
            bad = GOOD[request_id](disk, stack)
        expect_refusal(disk, bad, letter)


def test_cp06_get_config_not_negotiated(victim: Target) -> None:
    with victim.client(protocol=PROTOCOL_WANTED & ~Protocol.CONFIG) as disk:
        disk.wire.send(Request.GET_CONFIG, wire.config(0, bytes(8)))
        try:
            assert disk.wire.reply_to(Request.GET_CONFIG).payload == b""
        except Closed:
            return
        check_unchanged(disk)


@LETTERS
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Bad(Request.SEND_RARP, u64(0)), id="cp06-send-rarp-to-a-disk"),
        pytest.param(Bad(Request.NET_SET_MTU, u64(1500)), id="cp06-net-set-mtu-to-a-disk"),
        pytest.param(Bad(Request.IOTLB_MSG, bytes(32)), id="cp06-iotlb-without-iommu"),
        pytest.param(Bad(Request.SET_VRING_ENDIAN, vring_state(0, 1)), id="cp06-cross-endian"),
        pytest.param(Bad(Request.POSTCOPY_ADVISE), id="cp06-postcopy-advise"),
        pytest.param(Bad(Request.POSTCOPY_LISTEN), id="cp06-postcopy-listen"),
        pytest.param(Bad(Request.POSTCOPY_END), id="cp06-postcopy-end"),
        pytest.param(Bad(Request.VRING_KICK, vring_state(0, 0)), id="cp06-in-band-kick"),
    ],
)
def test_cp06_not_offered(victim: Target, bad: Bad, letter: str) -> None:
    with victim.client() as disk:
        expect_refusal(disk, bad, letter)


@pytest.mark.parametrize("wanted", [PROTOCOL_WANTED & ~Protocol.REPLY_ACK], ids=["cp06"])
def test_cp06_need_reply_not_negotiated(victim: Target, wanted: int) -> None:
    """Without REPLY_ACK the flag means nothing: no acknowledgement may get between replies."""
    with victim.client(protocol=wanted) as disk:
        disk.send_flagged(Request.SET_VRING_NUM, vring_state(SPARE, 64))
        try:
            assert disk.get_features()
        except Closed:
            return
        check_unchanged(disk)


def test_cp06_enable_without_protocol_features(victim: Target) -> None:
    with victim.client(features=FEATURES & ~F_PROTOCOL_FEATURES) as disk:
        expect_close(disk, Bad(Request.SET_VRING_ENABLE, vring_state(0, 1)))


# ---- 7, 8: more fds than the message carries ----


@LETTERS
@each("cp07", [r for r in GOOD if r not in TAKES_FDS and r != Request.REM_MEM_REG])
def test_cp07_fd_where_none_belongs(victim: Target, request_id: Request, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        expect_refusal(disk, Bad(request_id, good.payload, [eventfd(stack)]), letter)


def test_cp07_rem_mem_reg_with_an_fd(victim: Target) -> None:
    """Old front-ends send one; the back-end may take the message, and must close the fd
    (vhost-user specification, VHOST_USER_REM_MEM_REG)."""
    with victim.client() as disk, ExitStack() as stack:
        good = good_rem(disk, stack)
        disk.wire.ack_of(good.request, good.payload, [eventfd(stack)])
        check_unchanged(disk)


def test_cp07_ten_thousand_stray_fds(victim: Target) -> None:
    """Ten thousand refused fds in one connection: none may stay open while it lasts."""
    with victim.client() as disk, ExitStack() as stack:
        fd = eventfd(stack)
        before = victim.server.fds()
        for _ in range(10_000):
            assert disk.wire.ack_of(Request.SET_VRING_NUM, vring_state(SPARE, 64), [fd]) != 0
        assert victim.server.fds() == before
        check_unchanged(disk)


def test_cp07_a_thousand_stray_fds_one_a_connection(victim: Target) -> None:
    with ExitStack() as stack:
        fd = eventfd(stack)
        for _ in range(1000):
            with Session(victim.socket) as session:
                session.wire.send(Request.GET_FEATURES, b"", [fd])
                session.wire.wait_closed()


@LETTERS
@pytest.mark.parametrize("count", [2, 9, 16, 253], ids="cp08-{}-fds".format)
@each("cp08", [Request.SET_VRING_CALL, Request.ADD_MEM_REG, Request.SET_BACKEND_REQ_FD])
def test_cp08_too_many_fds(victim: Target, request_id: Request, count: int, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        refuse_or_close(disk, Bad(request_id, good.payload, [*good.fds] * count), letter)


@LETTERS
@pytest.mark.parametrize("count", [9, 253], ids="cp08-{}-fds".format)
def test_cp08_mem_table_of_8_regions_with_more_fds(victim: Target, count: int, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        regions = [new_region(disk, stack, (n + 1) << 40) for n in range(8)]
        fds = [regions[0].fd] * count
        table = wire.mem_table(r.pack() for r in regions)
        refuse_or_close(disk, Bad(Request.SET_MEM_TABLE, table, fds), letter)


def refuse_or_close(disk: BlkClient, bad: Bad, letter: str) -> None:
    """Letter E; but control data cut off by the kernel leaves the stream worthless, so that
    closing is right even where an acknowledgement was asked."""
    if letter == "close":
        expect_close(disk, bad)
        return
    try:
        assert disk.wire.ack_of(bad.request, bad.payload, bad.fds) != 0
    except Closed:
        return
    check_unchanged(disk)


# ---- 9, 10: fds missing, contradictory, or in the wrong place ----


@LETTERS
@each("cp09", sorted(TAKES_FDS))
def test_cp09_fd_missing(victim: Target, request_id: Request, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        expect_refusal(disk, Bad(request_id, good.payload), letter)


@LETTERS
@each("cp09", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_cp09_no_fd_bit_with_an_fd(victim: Target, request_id: Request, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        bad = Bad(request_id, u64(SPARE | wire.NO_FD), [eventfd(stack)])
        expect_refusal(disk, bad, letter)


@pytest.mark.parametrize("first", [0, 1], ids=["payload-only", "header-too"])
@each("cp10", [Request.SET_VRING_CALL, Request.ADD_MEM_REG, Request.SET_VRING_NUM])
def test_cp10_fds_on_the_second_segment(victim: Target, request_id: Request, first: int) -> None:
    with victim.client() as disk, ExitStack() as stack:
        good = GOOD[request_id](disk, stack)
        fds = good.fds or [eventfd(stack)]
        data = wire.message(request_id, good.payload)
        disk.wire.send_raw(data[: wire.HEADER.size], fds if first else ())
        try:
            disk.wire.send_raw(data[wire.HEADER.size :], fds)
        except Closed:
            return
        disk.wire.wait_closed()


def test_cp10_error_ack_leaves_the_stream_in_step(victim: Target) -> None:
    """A refused message in a pipeline: the messages behind it are read from the right byte."""
    with victim.client() as disk:
        bad = wire.message(Request.SET_VRING_NUM, vring_state(9, 64), flags=VERSION | NEED_REPLY)
        disk.wire.send_raw(bad + wire.message(Request.GET_QUEUE_NUM))
        assert disk.wire.reply_to(Request.SET_VRING_NUM).u64 != 0
        assert disk.wire.reply_to(Request.GET_QUEUE_NUM).u64 == SPARE + 1
        expect_error_ack(disk, Bad(Request.SET_VRING_NUM, vring_state(9, 64)))
