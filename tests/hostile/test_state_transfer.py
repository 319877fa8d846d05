"""Catalogue, control plane 38: the device's state, to the front-end and from it."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.frontend import wire
from tests.frontend.blk import F_CONFIG_WCE, FEATURES, WRITEBACK_OFFSET, BlkClient, check_healthy
from tests.frontend.session import PROTOCOL_WANTED
from tests.frontend.wire import Protocol, Request

from .target import QUEUES, Bad, Target, case, check_serves, check_unchanged, expect_error_ack

SAVE, LOAD = 0, 1
NO_FD = 0x100
PROTOCOL = PROTOCOL_WANTED | Protocol.DEVICE_STATE
HEADER = struct.Struct("<8sIIII")
BLOCK = 2
MOST = 1 << 16


def client(victim: Target, *, stopped: bool = True) -> BlkClient:
    disk = victim.client(queues=QUEUES, protocol=PROTOCOL, features=FEATURES | F_CONFIG_WCE)
    if stopped:
        for queue in range(QUEUES):
            disk.get_vring_base(queue)
    return disk


def state(
    body: bytes, *, version: int = 1, device: int = BLOCK, magic: bytes = b"vdev-dev"
) -> bytes:
    return HEADER.pack(magic, version, device, len(body), zlib.crc32(body)) + body


WRITE_THROUGH = state(json.dumps({"writeback": False}).encode())


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    with ExitStack() as stack:
        reader, writer = os.pipe()
        for fd in (reader, writer):
            stack.callback(close, fd)
        yield reader, writer


def close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return  # the test has closed it


def save(disk: BlkClient) -> bytes:
    with pipe() as (reader, writer):
        assert disk.set_device_state_fd(SAVE, writer) == NO_FD
        os.close(writer)
        data = b""
        while piece := os.read(reader, 4096):
            data += piece
    assert disk.check_device_state() == 0
    return data


def load(disk: BlkClient, data: bytes) -> int:
    """What CHECK says."""
    with pipe() as (reader, writer):
        assert disk.set_device_state_fd(LOAD, reader) == NO_FD
        os.close(reader)
        try:
            while data:
                data = data[os.write(writer, data) :]
        except BrokenPipeError:
            pass  # it has seen enough
        os.close(writer)
        return disk.check_device_state()


def writeback(disk: BlkClient) -> int:
    return disk.get_config(WRITEBACK_OFFSET, 1)[0]


def restart(disk: BlkClient) -> None:
    for queue, ring in enumerate(disk.rings):
        ring.reset()
        disk.start_ring(queue, ring)
    check_unchanged(disk)


def test_cp38_there_and_back(victim: Target) -> None:
    with client(victim) as disk:
        assert writeback(disk) == 1
        before = save(disk)
        assert load(disk, WRITE_THROUGH) == 0
        assert writeback(disk) == 0
        assert save(disk) == WRITE_THROUGH
        assert load(disk, before) == 0
        assert writeback(disk) == 1
        restart(disk)


DAMAGED = {
    "nothing": b"",
    "one-byte": WRITE_THROUGH[:1],
    "truncated-header": WRITE_THROUGH[: HEADER.size - 1],
    "header-alone": WRITE_THROUGH[: HEADER.size],
    "truncated-body": WRITE_THROUGH[:-1],
    "one-byte-more": WRITE_THROUGH + b"\0",
    "oversize": WRITE_THROUGH.ljust(MOST + 1, b" "),
    "endless": bytes(1 << 20),
    "version-0": state(b"{}", version=0),
    "version-2": state(json.dumps({"writeback": False}).encode(), version=2),
    "other-magic": state(json.dumps({"writeback": False}).encode(), magic=b"QEVM\0\0\0\3"),
    "other-device": state(json.dumps({"link_up": True}).encode(), device=1),
    "bit-flipped": WRITE_THROUGH[:-3] + bytes([WRITE_THROUGH[-3] ^ 1]) + WRITE_THROUGH[-2:],
    "no-json": state(b"\xff\xfe{"),
    "no-object": state(b"[]"),
    "empty-object": state(b"{}"),
    "wrong-type": state(b'{"writeback": 1}'),
    "unknown-field": state(b'{"writeback": false, "more": 1}'),
    "deep": state(b"[" * 60000),
    "size-2-32-minus-1": HEADER.pack(b"vdev-dev", 1, BLOCK, 0xFFFFFFFF, 0) + b"{}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_cp38_damaged(victim: Target, name: str) -> None:
    with client(victim) as disk:
        assert load(disk, DAMAGED[name]) != 0
        assert writeback(disk) == 1
        restart(disk)


def pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def stated(direction: int, phase: int, kind: str = "pipe") -> Bad:
    payload = wire.VRING_STATE.pack(direction, phase)
    fds: dict[str, Callable[[], int]] = {
        "pipe": pipe_without_reader,
        "null": lambda: os.open("/dev/null", os.O_RDWR),
        "file": lambda: os.memfd_create("state"),
        "eventfd": lambda: os.eventfd(0),
    }
    return Bad(Request.SET_DEVICE_STATE_FD, payload, [fds[kind]()])


@pytest.mark.parametrize(
    "build",
    [
        case("cp38-direction-2", lambda d, s: stated(2, 0)),
        case("cp38-direction-2-32-minus-1", lambda d, s: stated(0xFFFFFFFF, 0)),
        case("cp38-phase-1", lambda d, s: stated(SAVE, 1)),
        case("cp38-dev-null", lambda d, s: stated(SAVE, 0, "null")),
        case("cp38-file", lambda d, s: stated(LOAD, 0, "file")),
        case("cp38-eventfd", lambda d, s: stated(LOAD, 0, "eventfd")),
        case("cp38-no-fd", lambda d, s: Bad(Request.SET_DEVICE_STATE_FD, bytes(8))),
        case("cp38-no-fd-nor-phase", lambda d, s: Bad(Request.SET_DEVICE_STATE_FD, bytes(4))),
        case("cp38-check-without-a-transfer", lambda d, s: Bad(Request.CHECK_DEVICE_STATE)),
    ],
)  # fmt: skip
def test_cp38_refused(victim: Target, build: object) -> None:
    with client(victim) as disk, ExitStack() as stack:
        bad: Bad = build(disk, stack)  # type: ignore[operator]
        for fd in bad.fds:
            stack.callback(os.close, fd)
        assert disk.wire.ack_of(bad.request, bad.payload, bad.fds) & 0xFF
        assert disk.check_device_state() != 0
        restart(disk)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_cp38_while_running(victim: Target, direction: int) -> None:
    with client(victim, stopped=False) as disk, pipe() as ends:
        payload = wire.VRING_STATE.pack(direction, 0)
        expect_error_ack(disk, Bad(Request.SET_DEVICE_STATE_FD, payload, [ends[not direction]]))
        expect_error_ack(disk, Bad(Request.CHECK_DEVICE_STATE))


def test_cp38_one_ring_still_runs(victim: Target) -> None:
    with client(victim, stopped=False) as disk, pipe() as (_, writer):
        disk.get_vring_base(0)
        assert disk.set_device_state_fd(SAVE, writer) & 0xFF
        check_serves(disk, 1)


def test_cp38_not_agreed(victim: Target) -> None:
    with victim.client() as disk, pipe() as (_, writer):
        expect_error_ack(disk, Bad(Request.SET_DEVICE_STATE_FD, bytes(8), [writer]))
        expect_error_ack(disk, Bad(Request.CHECK_DEVICE_STATE))


def test_cp38_the_wrong_end(victim: Target) -> None:
    with client(victim) as disk:
        for direction in (SAVE, LOAD):
            with pipe() as ends:
                assert disk.set_device_state_fd(direction, ends[direction]) == NO_FD
                assert disk.check_device_state() != 0
        restart(disk)


def test_cp38_nobody_reads(victim: Target) -> None:
    with client(victim) as disk, pipe() as (reader, writer):
        os.close(reader)
        assert disk.set_device_state_fd(SAVE, writer) == NO_FD
        assert disk.check_device_state() != 0
        restart(disk)


def test_cp38_check_twice(victim: Target) -> None:
    with client(victim) as disk:
        save(disk)
        assert disk.check_device_state() != 0


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_cp38_slow(victim: Target, direction: int) -> None:
    """Nothing waits for it meanwhile but who asks how it is, and a ring that starts ends it."""
    with client(victim) as disk, pipe() as (reader, writer):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(4096))  # full, or the beginning of what never ends
        assert disk.set_device_state_fd(direction, (writer, reader)[direction]) == NO_FD
        for end in (reader, writer):
            os.set_blocking(end, True)
        for _ in range(20):
            assert disk.get_config(0, 8)
        restart(disk)
        assert disk.check_device_state() != 0


def test_cp38_replaced_and_left_behind(victim: Target) -> None:
    """A second transfer ends the first; leaving ends all."""
    with client(victim) as disk, pipe() as first, pipe() as second:
        for reader, _ in (first, second):
            assert disk.set_device_state_fd(LOAD, reader) == NO_FD
        os.close(second[0])
        os.write(first[1], WRITE_THROUGH)
        os.write(second[1], WRITE_THROUGH)
        os.close(second[1])
        assert disk.check_device_state() == 0
        assert disk.set_device_state_fd(LOAD, first[0]) == NO_FD
    check_healthy(victim.socket, queues=QUEUES)


def test_cp38_forgotten_with_its_front_end(victim: Target) -> None:
    with client(victim) as disk:
        assert load(disk, WRITE_THROUGH) == 0
    with client(victim) as disk:
        assert writeback(disk) == 1
