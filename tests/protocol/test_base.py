"""The base layer: memory, iothreads, served queues, metrics, the rate of warnings."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.protocol.fake import FakeDevice, memory_file, until
from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.iothread import IOThread
from vdev.memory import GuestMemory, Region
from vdev.metrics import BUCKETS, COUNTERS, device_stats, summarize
from vdev.ratelog import RateLimitedLog
from vdev.virtio.queue import QueueConfig, ServedQueue

FdCount = Callable[[], Counter[str]]
SIZE = 0x10000
TOP = 1 << 64


def region(guest: int, user: int, size: int = SIZE, offset: int = 0, length: int = SIZE) -> Region:
    fd = memory_file(length)
    try:
        return Region.map(fd, guest_addr=guest, size=size, user_addr=user, offset=offset)
    finally:
        os.close(fd)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:vdev-test")


def test_user_addresses_are_translated_whole() -> None:
    memory = GuestMemory([region(SIZE, 0x7000_0000), region(0, 0x1000_0000)])
    assert memory.guest_address(0x7000_0000, SIZE) == SIZE
    assert memory.guest_address(0x1000_0000 + SIZE - 1, 1) == SIZE - 1
    for user, size in ((0x1000_0000, SIZE + 1), (0x1000_0000 + SIZE, 1), (0, 1), (TOP - 1, 2)):
        with pytest.raises(PeerError):
            memory.guest_address(user, size)


@pytest.mark.parametrize(
    ("guest", "user", "size", "offset"),
    [
        (0, 0, 0, 0),
        (TOP - SIZE + 1, 0, SIZE, 0),
        (0, TOP - SIZE + 1, SIZE, 0),
        (0, 0, SIZE, TOP - 1),
        (0, 0, SIZE, 1 << 63),
        (0, 0, SIZE + 1, 0),
        (0, 0, SIZE, 4096),
        (0, 0, TOP - 1, 0),
    ],
)
def test_bad_region(guest: int, user: int, size: int, offset: int) -> None:
    with pytest.raises(PeerError):
        region(guest, user, size, offset)


def test_overlaps() -> None:
    one = region(0, 0x1000_0000)
    for other in (region(SIZE - 4096, 0), region(SIZE, 0x1000_0000 + 4096)):
        with pytest.raises(PeerError, match="share"):
            GuestMemory([one, other])
    GuestMemory([one, region(SIZE, 0x1000_0000 + SIZE)])


def test_mappings_go_with_their_last_user() -> None:
    before = mappings()
    one = region(0, 0)
    memory = GuestMemory([one])
    del one
    gc.collect()
    assert mappings() == before + 1
    del memory
    gc.collect()
    assert mappings() == before


@pytest_asyncio.fixture
async def iothread(fd_count: FdCount) -> AsyncIterator[IOThread]:
    thread = IOThread(poll_us=0)
    thread.start()
    yield thread
    await thread.close()


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = FakeDevice()
    yield device
    device.close()


def config(**changes: Any) -> QueueConfig:
    values: dict[str, Any] = {"index": 0, "size": 64, "features": 1 << lib.VIRTIO_F_VERSION_1}
    return QueueConfig(**{**values, "desc": 0, "avail": 0x1000, "used": 0x2000, **changes})


async def test_iothread_stats(iothread: IOThread) -> None:
    assert iothread.tid > 0
    assert iothread.stats()["queues"] == 0
    assert isinstance(iothread.has_io_uring, bool)


async def test_iothread_without_io_uring() -> None:
    thread = IOThread(io_uring=False)
    thread.start()
    assert not thread.has_io_uring
    with pytest.raises(RuntimeError):
        thread.start()
    await thread.close()
    await thread.close()


async def test_queue_starts_and_stops(iothread: IOThread, device: FakeDevice) -> None:
    memory = GuestMemory([region(0, 0)])
    for next_index in (0, 7, 65535):
        # An avail ring that is as far as we are: nothing to do.
        fd = memory_file(SIZE)
        os.pwrite(fd, next_index.to_bytes(2, "little"), 0x1002)
        memory = GuestMemory([Region.map(fd, guest_addr=0, size=SIZE, user_addr=0, offset=0)])
        os.close(fd)
        queue = await ServedQueue.start(config(next_index=next_index), device, memory, iothread)
        assert iothread.queues == 1
        await queue.set_enabled(False)
        await queue.set_memory(memory)
        assert await queue.stop() == next_index
        assert await queue.stop() == next_index
        assert iothread.queues == 0


@pytest.mark.parametrize(
    "changes", [{"size": 3}, {"size": 0}, {"desc": 8}, {"used": SIZE}, {"index": 9}, {"avail": 1}]
)
async def test_queue_that_cannot_start(
    iothread: IOThread, device: FakeDevice, changes: dict[str, int]
) -> None:
    with pytest.raises(PeerError):
        await ServedQueue.start(config(**changes), device, GuestMemory([region(0, 0)]), iothread)
    assert iothread.queues == 0


async def test_broken_queue_is_told_once(iothread: IOThread, device: FakeDevice) -> None:
    fd = memory_file(SIZE)
    memory = GuestMemory([Region.map(fd, guest_addr=0, size=SIZE, user_addr=0, offset=0)])
    os.pwrite(fd, (1000).to_bytes(2, "little"), 0x1002)
    os.close(fd)
    faults: list[str] = []
    queue = await ServedQueue.start(config(), device, memory, iothread, faults.append)
    await until(lambda: faults)
    await queue.set_memory(memory)
    await queue.stop()
    assert faults == ["avail index"]
    assert queue.fault == "avail index"


async def test_cancelled_waiters_lose_nothing(iothread: IOThread, device: FakeDevice) -> None:
    memory = GuestMemory([region(0, 0)])
    start = asyncio.ensure_future(ServedQueue.start(config(), device, memory, iothread))
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.wait([start])
    assert start.cancelled()
    assert iothread.queues == 0
    queue = await ServedQueue.start(config(), device, memory, iothread)
    for _ in range(3):
        stop = asyncio.ensure_future(queue.stop())
        await asyncio.sleep(0)
        stop.cancel()
        await asyncio.wait([stop])
    assert await queue.stop() == 0
    assert iothread.queues == 0


async def test_iothread_with_queues_is_not_closed(iothread: IOThread, device: FakeDevice) -> None:
    queue = await ServedQueue.start(config(), device, GuestMemory([region(0, 0)]), iothread)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        await iothread.close()
    assert await queue.stop() == 0


def test_counters(device: FakeDevice) -> None:
    stats = device_stats(device.native, 2)
    assert len(stats["queues"]) == 2
    assert set(stats["total"]) == {*COUNTERS, "latency"}
    assert stats["total"]["requests"] == 0
    assert device.stats() == stats
    with pytest.raises(OSError, match="queue 2"):
        device_stats(device.native, 3)
    assert device_stats(device.native, 0)["total"] == stats["total"]


def test_counter_names_are_those_of_the_header() -> None:
    names = set(ffi.typeof("enum vhost_counter").elements.values())
    assert {f"VHOST_COUNTER_{name.upper()}" for name in COUNTERS} | {"VHOST_COUNTER_COUNT"} == names


def test_latencies() -> None:
    def bucket(ns: int) -> int:
        return max(b for b in range(BUCKETS) if lib.vhost_histogram_floor(b) <= ns)

    histogram = [0] * BUCKETS
    assert set(summarize(histogram).values()) == {0}
    histogram[bucket(1_000)] = 989
    histogram[bucket(50_000)] = 10
    histogram[bucket(2_000_000)] = 1
    got = summarize(histogram)
    assert got["count"] == 1000
    near = {"mean": 3489, "p50": 1_000, "p99": 50_000, "p99.9": 50_000, "max": 2_000_000}
    for name, truth in near.items():
        assert abs(got[name] - truth) <= truth / 8, name
    assert got["p50"] <= got["p99"] <= got["p99.9"] <= got["max"]


def test_warnings_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = RateLimitedLog(logging.getLogger("x"), burst=2, period=10, clock=lambda: now)
    for _ in range(5):
        log.warning("flood")
    assert [record.message for record in caplog.records] == ["flood", "flood"]
    now = 10.0
    log.warning("later")
    assert [r.message for r in caplog.records[2:]] == ["3 warnings more were left out", "later"]
