"""The balloon: what the guest lends goes back to the host, and nothing else does."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frontend.ring import Desc
from tests.vmm.served import Served, threads
from vdev._native import lib
from vdev.errors import PeerError, UserError
from vdev.virtio.spec import RING_FEATURES
from vdev.vmm.devices.balloon import DEFLATE, INFLATE, PAGE, PFNS_MOST, STATISTICS, BalloonDevice

RAM = ((0, 4 << 20), (1 << 32, 4 << 20))  # where `Served` has it
HIGH = 1 << 32
STATS = 1 << lib.VIRTIO_BALLOON_F_STATS_VQ
REPORTING = 1 << lib.VIRTIO_BALLOON_F_PAGE_REPORTING


class Host:
    """Remembers what was discarded; does it for real where there is memory."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.served: Served | None = None

    def discard(self, address: int, size: int) -> None:
        self.ranges.append((address, size))
        if self.served is not None:
            native = self.served.mapped.native
            assert lib.vhost_memory_discard(native, address, size) == 0


def serve(host: Host, **options: int) -> Served:
    features = options.pop("features", None)
    device = BalloonDevice(RAM, host.discard, iothreads=threads(), **options)  # type: ignore[arg-type]
    host.served = Served(device, features=features)
    return host.served


def pfns(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def high_pages(*numbers: int) -> list[int]:
    return [HIGH // PAGE + n for n in numbers]


def resident(served: Served) -> int:
    """Bytes of the upper region's file that take memory."""
    return os.fstat(served.memory.regions[1].fd).st_blocks * 512


async def test_inflated_pages_go_back_to_the_host() -> None:
    host = Host()
    async with serve(host) as served:
        served.memory.write(HIGH, b"\xff" * (64 * PAGE))
        before = resident(served)
        assert await served.request(INFLATE, served.data(pfns(*high_pages(*range(8, 40))))) == 0
        assert host.ranges == [(HIGH + 8 * PAGE, 32 * PAGE)]
        assert before - resident(served) == 32 * PAGE
        assert served.content(Desc(HIGH + 8 * PAGE, 32 * PAGE)) == bytes(32 * PAGE)
        assert served.content(Desc(HIGH + 7 * PAGE, 1), Desc(HIGH + 40 * PAGE, 1)) == b"\xff\xff"
        assert await served.request(DEFLATE, served.data(pfns(*high_pages(*range(8, 40))))) == 0
        served.memory.write(HIGH + 8 * PAGE, b"back")
        assert served.device.describe()["discarded"] == 32 * PAGE


async def test_pages_in_any_order_are_discarded_in_few_calls() -> None:
    host = Host()
    async with serve(host) as served:
        pages = high_pages(9, 3, 5, 4, 9, 3, 8)
        await served.request(INFLATE, served.data(pfns(*pages[:3])), served.data(pfns(*pages[3:])))
        assert host.ranges == [(HIGH + 3 * PAGE, 3 * PAGE), (HIGH + 8 * PAGE, 2 * PAGE)]


@pytest.mark.parametrize(
    "pages",
    [
        [0xFFFFFFFF],
        [RAM[0][1] // PAGE],
        [HIGH // PAGE - 1],
        [(HIGH + RAM[1][1]) // PAGE],
        list(range(0x80000000, 0x80000000 + 256)),
    ],
)
async def test_pages_outside_ram_are_nobodys(pages: list[int]) -> None:
    host = Host()
    async with serve(host) as served:
        assert await served.request(INFLATE, served.data(pfns(*pages))) == 0
        assert host.ranges == []


async def test_a_run_over_the_end_of_ram_is_cut() -> None:
    host = Host()
    async with serve(host) as served:
        last = (HIGH + RAM[1][1]) // PAGE - 1
        await served.request(INFLATE, served.data(pfns(last, last + 1, last + 2)))
        assert host.ranges == [(last * PAGE, PAGE)]


async def test_odd_requests_do_no_harm() -> None:
    host = Host()
    async with serve(host) as served:
        await served.request(INFLATE, served.data(pfns(*high_pages(3))[:3]))
        await served.request(INFLATE, served.room(8))
        await served.request(DEFLATE, served.data(b"x"))
        assert host.ranges == []
        await served.request(INFLATE, served.data(pfns(*high_pages(3)) + b"tail"[:3]))
        assert host.ranges == [(HIGH + 3 * PAGE, PAGE)]
        host.ranges.clear()
        many = served.data(pfns(*high_pages(*range(100, 101)) * (2 * PFNS_MOST)))
        await served.request(INFLATE, many)
        assert host.ranges == [(HIGH + 100 * PAGE, PAGE)]


@pytest.mark.parametrize("queue", [3, 4])
async def test_free_pages_that_are_reported(queue: int) -> None:
    """Behind statistics, with or without a gap for the queue of hints."""
    host = Host()
    async with serve(host) as served:
        served.memory.write(HIGH, b"\xff" * (512 * PAGE))
        ranges = [Desc(HIGH + 16 * PAGE, 8 * PAGE, write=True), Desc(HIGH + 100, 4 * PAGE, True)]
        assert await served.request(queue, *ranges) == 0
        assert host.ranges == [(HIGH + 16 * PAGE, 8 * PAGE), (HIGH + PAGE, 3 * PAGE)]
        assert served.content(ranges[0]) == bytes(8 * PAGE)
        assert served.content(Desc(HIGH + 100, 8)) == b"\xff" * 8
        host.ranges.clear()
        assert await served.request(queue, Desc(HIGH + 1, 2 * PAGE - 2, True)) == 0
        assert await served.request(queue, Desc(HIGH, PAGE)) == 0  # not writable: no report
        assert host.ranges == []


async def test_reports_without_statistics_come_by_the_third_queue() -> None:
    host = Host()
    async with serve(host, features=RING_FEATURES | REPORTING) as served:
        assert await served.request(2, Desc(HIGH, PAGE, True)) == 0
        assert host.ranges == [(HIGH, PAGE)]


async def test_nothing_is_reported_that_was_not_negotiated() -> None:
    host = Host()
    async with serve(host, features=RING_FEATURES) as served:
        for queue in (2, 3, 4):
            assert await served.request(queue, Desc(HIGH, PAGE, True)) == 0
        assert host.ranges == []
        device = served.device
        assert isinstance(device, BalloonDevice)
        with pytest.raises(UserError, match="no statistics"):
            await device.memory_stats()


async def test_huge_pages_are_discarded_whole() -> None:
    host = Host()
    huge = 2 << 20
    async with serve(host, page=huge) as served:
        for page in range(512, 1023, 256):
            pages = high_pages(*range(page, page + 256))
            await served.request(INFLATE, served.data(pfns(*pages)))
        assert host.ranges == []
        await served.request(INFLATE, served.data(pfns(*high_pages(*range(500, 1024)))))
        assert host.ranges == [(HIGH + huge, huge)]


async def test_a_host_that_fails_is_told_of_sparingly(caplog: pytest.LogCaptureFixture) -> None:
    def discard(address: int, size: int) -> None:
        raise OSError("no")

    async with Served(BalloonDevice(RAM, discard, iothreads=threads())) as served:
        for _ in range(30):
            await served.request(INFLATE, served.data(pfns(*high_pages(1))))
        assert served.device.describe()["discarded"] == 0
    assert len(caplog.records) == 10


async def test_target_and_actual() -> None:
    device = BalloonDevice(RAM, Host().discard, iothreads=threads())
    told: list[bytes] = []
    device.config_changed.append(lambda: told.append(device.config()))
    device.set_target(1 << 20)
    device.set_target((1 << 20) + 1)
    assert told == [struct.pack("<IIII", 256, 0, 0, 0)]
    assert device.target == 1 << 20
    device.write_config(4, struct.pack("<I", 100))
    assert device.actual == 100 * PAGE
    assert device.config() == struct.pack("<IIII", 256, 100, 0, 0)
    device.write_config(4, b"\xff\xff\xff\xff")
    assert device.actual == 8 << 20
    for offset, data in ((0, bytes(4)), (4, bytes(3)), (8, bytes(4)), (2, bytes(4)), (4, b"")):
        with pytest.raises(PeerError):
            device.write_config(offset, data)
    for size in (-1, (8 << 20) + 1):
        with pytest.raises(UserError, match="balloon of"):
            device.set_target(size)
    device.reset()
    assert (device.actual, device.target) == (0, 1 << 20)
    device.close()


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, ()),
        ({"deflate_on_oom": False}, ("DEFLATE_ON_OOM",)),
        ({"statistics": False, "reporting": False}, ("STATS_VQ", "PAGE_REPORTING")),
    ],
)
async def test_features(options: dict[str, bool], absent: Sequence[str]) -> None:
    device = BalloonDevice(RAM, Host().discard, iothreads=threads(), **options)  # type: ignore[arg-type]
    for name in ("DEFLATE_ON_OOM", "STATS_VQ", "PAGE_REPORTING"):
        bit = getattr(lib, f"VIRTIO_BALLOON_F_{name}")
        assert bool(device.features >> bit & 1) == (name not in absent)
    device.close()


# ---- statistics ----


def statistics(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in pairs)


async def test_statistics_are_fresh() -> None:
    host = Host()
    async with serve(host) as served:
        device = served.device
        assert isinstance(device, BalloonDevice)
        buffer = served.data(statistics((4, 1), (5, 1)))
        served.submit(STATISTICS, buffer)
        for free in (1000, 2000):
            asking = asyncio.ensure_future(device.memory_stats())
            await served.used(STATISTICS)
            answer = statistics((4, free), (5, 1 << 40), (999, 7))
            served.submit(STATISTICS, served.data(answer))
            assert await asking == {"memfree": free, "memtot": 1 << 40}
        assert await served.stop(STATISTICS) == [2]  # the last answer went back into the ring


async def test_odd_statistics() -> None:
    host = Host()
    async with serve(host) as served:
        device = served.device
        assert isinstance(device, BalloonDevice)
        served.submit(STATISTICS, served.room(10))
        for answer in (served.data(b"123456789"), served.room(10), served.data(bytes(64 << 10))):
            asking = asyncio.ensure_future(device.memory_stats())
            await served.used(STATISTICS)
            served.submit(STATISTICS, answer)
            assert await asking == ({"swap_in": 0} if answer.len > 10 else {})


async def test_a_question_that_the_guest_does_not_answer() -> None:
    host = Host()
    async with serve(host) as served:
        device = served.device
        assert isinstance(device, BalloonDevice)
        asking = [asyncio.ensure_future(device.memory_stats()) for _ in range(3)]
        served.submit(STATISTICS, served.data(statistics((4, 1))))
        await served.used(STATISTICS)
        asking[0].cancel()
        await served.stop()
        device.reset()
        for question in asking[1:]:
            with pytest.raises(UserError, match="no statistics"):
                await question


@given(st.lists(st.integers(0, 0xFFFFFFFF) | st.integers(0, 1100), max_size=64))
async def test_only_ram_is_discarded(pages: list[int]) -> None:
    ranges: list[tuple[int, int]] = []
    ram = ((PAGE, 3 * PAGE), (1024 * PAGE + 100, 2 * PAGE))
    device = BalloonDevice(
        ram, lambda address, size: ranges.append((address, size)), iothreads=threads()
    )
    async with Served(device) as served:
        await served.request(
            INFLATE, *([served.data(pfns(*pages))] if pages else []), served.room(1)
        )
    found = {
        page for start, size in ranges for page in range(start // PAGE, (start + size) // PAGE)
    }
    assert found == set(pages) & {1, 2, 3, 1025}
