"""A dirty log of our own, and queues that write to it; what a snapshot of our VMM reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tests.protocol.fake import FakeDevice
from tests.protocol.guest import BASE, DEPTH, PAGE, SIZE, Guest
from vdev.dirtylog import LOG_PAGE, DirtyLog
from vdev.errors import PeerError
from vdev.iothread import IOThread
from vdev.virtio.queue import Queue

PAGES = (BASE + SIZE) // PAGE
SPAN = 1 << 20


def test_what_is_taken() -> None:
    assert LOG_PAGE == 4096
    log = DirtyLog.new(100)
    bits = bytearray([0x80, 0, 0])
    log.take(0, bits)
    assert bits == bytes([0x80, 0, 0])
    for first, size in ((4, 1), (0, 14), (104, 1), (2**64 - 8, 1)):
        with pytest.raises(ValueError, match="the log has 100"):
            log.take(first, bytearray(size))
    with pytest.raises(BufferError):
        log.take(0, bytes(1))  # type: ignore[arg-type]


def test_a_log_in_a_file() -> None:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, bytes([0, 0xFF, 0x81, 0]), 0)
        log = DirtyLog.map(fd, offset=1, size=2)
        assert log.pages == 16
        bits = bytearray(1)
        log.take(8, bits)
        assert bits == bytes([0x81])
        assert os.pread(fd, 4, 0) == bytes([0, 0xFF, 0, 0])
        for offset, size in ((0, 5), (0, 0), (2**64 - 1, 1), (4, 1)):
            with pytest.raises(PeerError, match="dirty log of"):
                DirtyLog.map(fd, offset=offset, size=size)
    finally:
        os.close(fd)


@pytest_asyncio.fixture
async def iothread(fd_count: Callable[[], Counter[str]]) -> AsyncIterator[IOThread]:
    thread = IOThread(poll_us=0)
    thread.start()
    yield thread
    await thread.close()


def dirty(log: DirtyLog) -> set[int]:
    """The pages of the guest's memory that are in the log, by number from its beginning."""
    bits = bytearray(SIZE // PAGE // 8)
    log.take(BASE // PAGE, bits)
    return {8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


async def test_queues_write_to_a_log(iothread: IOThread) -> None:
    device = FakeDevice([iothread])
    log = DirtyLog.new(PAGES)
    try:
        with Guest() as guest:
            ring = guest.queue(0)
            queue = await device.start_queue(ring, guest.memory)
            await guest.load(ring, requests=300, start=0, span=SPAN, write_percent=0)
            assert dirty(log) == set()
            await queue.set_log(log, ring.used)
            before = bytes(guest.map)
            await guest.load(ring, requests=300, start=0, span=SPAN, write_percent=0)
            await queue.stop()
            found = dirty(log)
            changed = {
                at // PAGE
                for at in range(0, SIZE, PAGE)
                if before[at : at + PAGE] != guest.map[at : at + PAGE]
            }
            # The load's own: its rings, and the header and status of each request.
            first = guest._buffers[0] - BASE
            drivers = {(at - BASE) // PAGE for at in (ring.desc, ring.avail)}
            drivers |= {first // PAGE + n for n in range(DEPTH)}
            assert (ring.used - BASE) // PAGE in found
            assert changed - found <= drivers
            assert len(found) <= 1 + 2 * DEPTH
            assert dirty(log) == set()
    finally:
        device.close()


async def test_a_log_that_is_too_small(iothread: IOThread) -> None:
    device = FakeDevice([iothread])
    faults: list[str] = []
    try:
        with Guest() as guest:
            ring = guest.queue(0)
            queue: Queue = await device.start_queue(ring, guest.memory, faults.append)
            await queue.set_log(DirtyLog.new(8))
            # It completes what it had popped.
            await guest.load(ring, requests=3, start=0, span=SPAN)
            await queue.stop()
            assert queue.fault == "log"
            assert faults == ["log"]
    finally:
        device.close()
