"""Devices written in Python: requests come in batches, and each is completed once."""

from __future__ import annotations

import asyncio
import gc
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import Desc, split
from tests.vmm.served import SIZE, Served, threads
from vdev.virtio.batch import BATCH, BatchDevice, Chain

DOCUMENT = Path(__file__).parents[2] / "docs" / "devices.md"


class Recorder(BatchDevice):
    """Does with each batch what the test says; queue 1 is on demand."""

    device_id = 42
    name = "recorder"
    on_demand = frozenset({1})

    def __init__(self, work: Callable[[list[Chain]], Awaitable[None] | None]) -> None:
        super().__init__(2, threads())
        self.work = work
        self.batches: list[int] = []
        self.recalls: asyncio.Queue[int] = asyncio.Queue()
        self.there = asyncio.Event()
        self.called = asyncio.Event()

    def handle(self, queue: int, chains: list[Chain]) -> Awaitable[None] | None:
        self.batches.append(len(chains))
        self.called.set()
        return self.work(chains)

    def available(self, queue: int) -> None:
        assert queue == 1
        self.there.set()

    def recall(self, queue: int) -> None:
        self.recalls.put_nowait(queue)


def shout(chains: list[Chain]) -> None:
    for chain in chains:
        chain.write(chain.read().upper())
        chain.complete()


async def test_a_request_crosses_over(fd_count: Callable[[], Counter[str]]) -> None:
    async with Served(Recorder(shout)) as served:
        answer = [served.room(3), served.room(10)]
        assert await served.request(0, served.data(b"hel"), served.data(b"lo"), *answer) == 5
        assert served.content(*answer, size=5) == b"HELLO"
        total = served.device.stats()["total"]
        assert (total["requests"], total["completions"]) == (1, 1)
        assert (total["bytes_read"], total["bytes_written"]) == (5, 5)
        assert total["latency"]["count"] == 1


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_requests_come_in_batches(packed: bool) -> None:
    device = Recorder(shout)
    async with Served(device, size=256, start=False, packed=packed) as served:
        ring = served.rings[0]
        ring.offer(*[ring.add([served.data(b"x")]) for _ in range(200)])
        await served.start()
        for _ in range(200):
            await served.used(0)
        assert max(device.batches) <= BATCH
        assert len(device.batches) == -(-200 // BATCH)


async def test_an_asynchronous_handler_has_one_call_at_a_time() -> None:
    running = 0
    gate = asyncio.Event()

    async def work(chains: list[Chain]) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await gate.wait()
        shout(chains)
        running -= 1

    device = Recorder(work)
    async with Served(device) as served:
        served.submit(0, served.data(b"a"), served.room(1))
        await device.called.wait()
        for _ in range(9):
            served.submit(0, served.data(b"b"), served.room(1))
        gate.set()
        assert [(await served.used(0)).len for _ in range(10)] == [1] * 10


def fail(chains: list[Chain]) -> None:
    chains[0].complete(0)
    raise ZeroDivisionError


async def fail_later(chains: list[Chain]) -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError


def forget(chains: list[Chain]) -> None:
    return


@pytest.mark.parametrize("work", [fail, fail_later, forget])
async def test_what_a_handler_leaves_is_completed_empty(
    work: Callable[[list[Chain]], Awaitable[None] | None], caplog: pytest.LogCaptureFixture
) -> None:
    async with Served(Recorder(work)) as served:
        for _ in range(40):
            assert await served.request(0, served.room(8)) == 0
    assert len(caplog.records) <= 10
    assert ("ZeroDivisionError" in caplog.text) == (work is not forget)


async def test_a_chain_is_done_once() -> None:
    seen: list[Chain] = []

    def work(chains: list[Chain]) -> None:
        for chain in chains:
            with pytest.raises(ValueError, match="5 bytes written of 4"):
                chain.complete(5)
            with pytest.raises(ValueError, match="-1"):
                chain.complete(-1)
            with pytest.raises(RuntimeError, match="on demand"):
                chain.give_back()
            chain.complete(4)
            for again in (chain.complete, chain.give_back, chain.read):
                with pytest.raises(RuntimeError, match="done"):
                    again()
            seen.append(chain)

    async with Served(Recorder(work)) as served:
        assert await served.request(0, served.room(4)) == 4
        assert len(seen) == 1


async def test_reading_and_writing_go_on_where_they_were() -> None:
    def work(chains: list[Chain]) -> None:
        (chain,) = chains
        assert (chain.readable_len, chain.writable_len) == (8, 4)
        assert [chain.read(n) for n in (3, 0, 3, 9, 9)] == [b"abc", b"", b"def", b"gh", b""]
        assert chain.write(b"12") == 2
        assert chain.write(b"3456") == 2
        assert chain.write(b"7") == 0
        assert [bytes(view) for view in chain.writable] == [b"1", b"234"]
        with pytest.raises(TypeError):
            chain.readable[0][0] = 0
        chain.complete()

    async with Served(Recorder(work)) as served:
        room = [served.room(1), served.room(3)]
        chain = [served.data(b"abcd"), served.data(b"e"), served.data(b"fgh"), *room]
        assert await served.request(0, *chain) == 4


async def test_ranges_are_guest_addresses() -> None:
    ranges: list[tuple[int, int]] = []

    def work(chains: list[Chain]) -> None:
        ranges.extend(chains[0].writable_ranges)

    async with Served(Recorder(work)) as served:
        high = served.memory.alloc(64, 8, region=served.memory.regions[1])
        low = served.room(16)
        await served.request(0, served.data(b"x"), low, Desc(high, 64, write=True))
        assert ranges == [(low.addr, 16), (high, 64)]


async def test_a_view_outlives_everything() -> None:
    kept: list[memoryview] = []

    def work(chains: list[Chain]) -> None:
        kept.append(chains[0].readable[0][2:])

    async with Served(Recorder(work)) as served:
        await served.request(0, served.data(b"stays"))
    del served
    gc.collect()
    assert bytes(kept[0]) == b"ays"
    kept.clear()
    gc.collect()


async def test_chains_on_demand_wait_and_go_back() -> None:
    device = Recorder(shout)
    async with Served(device) as served:
        heads = [served.submit(1, served.room(8)) for _ in range(3)]
        await device.there.wait()
        (first,) = device.take(1, 1)
        first.write(b"input")
        first.complete()
        element = await served.used(1)
        assert (element.id, element.len) == (heads[0], 5)
        assert await served.stop() == [0, 1]  # the rest was never taken
        device.there.clear()
        await served.start()
        await device.there.wait()
        assert device.recalls.empty()
        for chain in device.take(1):
            chain.complete(0)
        assert {(await served.used(1)).id for _ in range(2)} == set(heads[1:])


async def test_a_stop_recalls_what_was_taken() -> None:
    device = Recorder(shout)
    async with Served(device) as served:
        for _ in range(4):
            served.submit(1, served.room(8))
        await device.there.wait()
        chains = device.take(1)
        while len(chains) < 4:
            chains += device.take(1)
            await asyncio.sleep(0)
        stopping = asyncio.ensure_future(served.stop())
        assert await device.recalls.get() == 1
        chains[0].complete(8)
        for chain in chains[1:]:
            chain.give_back()
        assert await stopping == [0, 1]
        assert split(served.rings[1]).used_idx == 1


async def test_a_handler_may_give_back_after_the_recall() -> None:
    held: list[Chain] = []

    async def work(chains: list[Chain]) -> None:
        held.extend(chains)
        await device.recalls.get()
        for chain in chains:
            chain.give_back()

    device = Recorder(work)
    async with Served(device) as served:
        served.submit(0, served.room(8))
        await device.called.wait()
        assert await served.stop() == [0, 0]
        device.work = shout
        await served.start()
        assert (await served.used(0)).len == 0


async def test_a_broken_ring_completes_what_was_taken() -> None:
    device = Recorder(shout)
    async with Served(device) as served:
        served.submit(1, served.room(8))
        await device.there.wait()
        (chain,) = device.take(1)
        split(served.rings[1]).avail_idx = 100
        served.rings[1].kick()
        assert await served.faults.get() == "avail index"
        chain.complete(1)
        assert (await served.used(1)).len == 1
        assert await served.request(0, served.data(b"a"), served.room(1)) == 1


@pytest.mark.parametrize("indirect", [False, True])
async def test_a_guest_cannot_make_reads_larger_than_asked(indirect: bool) -> None:
    got: list[tuple[int, int]] = []

    def work(chains: list[Chain]) -> None:
        got.extend((chain.readable_len, len(chain.read())) for chain in chains)

    async with Served(Recorder(work)) as served:
        region: Region = served.memory.regions[0]
        chain = [Desc(region.guest_addr, region.size)] * SIZE
        served.submit(0, *chain, indirect=indirect)
        await served.used(0)
        assert got == [(len(chain) * region.size, 1 << 20)]


async def test_memory_is_referenced_while_a_chain_is_out() -> None:
    device = Recorder(shout)
    async with Served(device) as served:
        served.submit(1, served.data(b"before"), served.room(8))
        await device.there.wait()
        (chain,) = device.take(1)
        assert isinstance(served.memory, GuestMemory)
        moving = asyncio.ensure_future(served.queues[1].set_memory(served.mapped))
        assert await device.recalls.get() == 1
        assert not moving.done()
        assert chain.read() == b"before"
        chain.complete(0)
        await moving


async def test_close_twice(fd_count: Callable[[], Counter[str]]) -> None:
    device = Recorder(shout)
    assert device.take(1) == []
    assert device.config() == b""
    device.close()
    device.close()
    assert device.take(0) == []


async def test_the_example_in_the_documents() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 40
    names: dict[str, object] = {}
    exec(compile(example, "docs/devices.md", "exec"), names)
    make = names["AdderDevice"]
    assert callable(make)
    async with Served(make(threads())) as served:
        room = served.room(8)
        numbers = [(1).to_bytes(8, "little"), (41).to_bytes(8, "little")]
        assert await served.request(0, *map(served.data, numbers), room) == 8
        assert int.from_bytes(served.content(room), "little") == 42
        assert await served.request(0, served.data(b"odd"), served.room(8)) == 0
        assert await served.request(0, served.data(numbers[0])) == 0
        assert served.device.config() == (1).to_bytes(4, "little")
