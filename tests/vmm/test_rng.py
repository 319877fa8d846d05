"""The entropy device."""

from __future__ import annotations

import pytest

from tests.frontend.ring import Desc
from tests.vmm.served import SIZE, Served, threads
from vdev._native import lib
from vdev.vmm.devices.rng import CHAIN_MOST, RngDevice


async def test_buffers_are_filled() -> None:
    device = RngDevice(iothreads=threads())
    assert device.device_id == 4
    assert device.config() == b""
    assert device.features >> lib.VIRTIO_F_VERSION_1 & 1
    async with Served(device) as served:
        first, second = served.room(64), served.room(64)
        assert await served.request(0, first) == 64
        assert await served.request(0, second) == 64
        contents = {served.content(first), served.content(second), bytes(64)}
        assert len(contents) == 3


async def test_a_buffer_in_pieces_is_filled_over_all_of_them() -> None:
    async with Served(RngDevice(iothreads=threads(), source=lambda n: bytes(range(n)))) as served:
        pieces = [served.room(n) for n in (1, 4, 11)]
        assert await served.request(0, *pieces) == 16
        assert served.content(*pieces) == bytes(range(16))


@pytest.mark.parametrize("size", [1, CHAIN_MOST, CHAIN_MOST + 1, 3 * CHAIN_MOST])
async def test_what_is_written_is_what_is_said(size: int) -> None:
    async with Served(RngDevice(iothreads=threads(), source=lambda n: b"\x5a" * n)) as served:
        room = served.room(size)
        written = await served.request(0, room)
        assert written == min(size, CHAIN_MOST)
        assert served.content(room) == b"\x5a" * written + bytes(size - written)


async def test_a_request_for_gigabytes_costs_a_page() -> None:
    asked: list[int] = []

    def source(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    async with Served(RngDevice(iothreads=threads(), source=source)) as served:
        high = served.memory.regions[1]
        chain = [Desc(high.guest_addr, high.size, write=True)] * SIZE
        assert await served.request(0, *chain) == CHAIN_MOST
        assert asked == [CHAIN_MOST]


async def test_a_readable_buffer_gets_nothing() -> None:
    async with Served(RngDevice(iothreads=threads())) as served:
        data = served.data(b"mine")
        assert await served.request(0, data) == 0
        assert served.content(data) == b"mine"
        room = served.room(8)
        assert await served.request(0, data, room) == 8
        assert served.content(data) == b"mine"


async def test_a_full_ring_is_served_whole() -> None:
    async with Served(RngDevice(iothreads=threads()), start=False) as served:
        ring = served.rings[0]
        heads = [ring.add([served.room(16)]) for _ in range(SIZE)]
        ring.offer(*heads)
        await served.start()
        got = [await served.used(0) for _ in range(SIZE)]
        assert [element.id for element in got] == heads
        assert {element.len for element in got} == {16}


async def test_a_source_that_fails_costs_one_batch() -> None:
    def source(size: int) -> bytes:
        raise OSError("no entropy")

    async with Served(RngDevice(iothreads=threads(), source=source)) as served:
        assert await served.request(0, served.room(8)) == 0
        assert await served.request(0, served.room(8)) == 0
