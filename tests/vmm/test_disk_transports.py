"""What both transports share, with a disk behind it: the life of a device, and its faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.frontend.ring import split
from tests.vmm.driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    RING_PACKED,
    VERSION_1,
    Driver,
    MmioDriver,
    PciDriver,
    mmio_disk,
    pci_disk,
)
from tests.vmm.rig import Rig
from vdev.blk.device import BlkDevice

LIVE = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
AnyDriver = PciDriver | MmioDriver


BOTH_LAYOUTS = pytest.mark.parametrize(
    "features", [VERSION_1, VERSION_1 | RING_PACKED], ids=["split", "packed"]
)


@pytest.fixture(params=["pci", "mmio"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def disk(transport: str, tmp_path: Path) -> AsyncIterator[AnyDriver]:
    async with Rig(pci=transport == "pci") as rig:
        make = pci_disk if transport == "pci" else mmio_disk
        driver = await make(rig, tmp_path / "disk", num_queues=2)
        yield driver
        driver.close()


def device(driver: AnyDriver) -> BlkDevice:
    found = driver.transport.device
    assert isinstance(found, BlkDevice)
    return found


async def check_io(driver: Driver, queue: int = 0, fill: int = 0x5A) -> None:
    """A block there and back."""
    block = bytes([fill]) * 4096
    write = driver.disk_write(8, block)
    assert await driver.request(queue, *write) == 1
    assert driver.content(write[2]) == b"\0"
    read = driver.disk_read(8, 4096)
    assert await driver.request(queue, *read) == 4097
    assert driver.content(read[1]) == block


@BOTH_LAYOUTS
async def test_a_driver_reads_and_writes(disk: AnyDriver, features: int) -> None:
    assert await disk.config(0, 8) == 2048
    await disk.start(0, 1, features=features)
    await check_io(disk, 0, 1)
    await check_io(disk, 1, 2)


async def test_the_features_are_the_devices(disk: AnyDriver) -> None:
    assert await disk.offered() == device(disk).features


async def test_a_device_starts_again_after_reset(disk: AnyDriver) -> None:
    for fill in range(3):
        await disk.start(0)
        await check_io(disk, 0, fill)
        await disk.set_status(0)
        assert disk.transport.info()["queues"] == []


@pytest.mark.parametrize("features", [0, 1, 1 << 5, VERSION_1 | 1 << 60, VERSION_1 | 1 << 31])
async def test_features_that_cannot_be_are_refused(disk: AnyDriver, features: int) -> None:
    assert not await disk.negotiate(features) & FEATURES_OK
    # Going on regardless starts nothing.
    await disk.set_queue(0)
    await disk.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert disk.transport.info()["queues"] == []
    # And another try may succeed.
    await disk.accept(VERSION_1)
    await disk.set_status(LIVE)
    assert await disk.status() == LIVE
    await check_io(disk)


async def test_features_stay_what_they_were_when_they_were_accepted(disk: AnyDriver) -> None:
    await disk.start(0)
    await disk.accept(VERSION_1 | 1 << 34)
    await disk.set_status(ACKNOWLEDGE | DRIVER)
    assert await disk.status() == LIVE
    await disk.set_status(LIVE)
    assert disk.transport.info()["features"] == VERSION_1
    await disk.set_queue(1)
    await check_io(disk, 1)
    await check_io(disk, 0)


async def test_a_driver_cannot_ask_for_its_own_reset(disk: AnyDriver) -> None:
    await disk.start(0)
    await disk.set_status(LIVE | NEEDS_RESET)
    assert await disk.status() == LIVE


async def test_a_queue_may_be_enabled_late(disk: AnyDriver) -> None:
    await disk.start()
    assert disk.transport.info()["queues"] == []
    await disk.set_queue(1)
    await check_io(disk, 1)
    await disk.set_queue(0)
    await check_io(disk, 0)


async def test_only_a_live_device_runs_queues(disk: AnyDriver) -> None:
    await disk.set_queue(0)
    assert disk.transport.info()["queues"] == []
    await disk.set_status(DRIVER_OK)
    assert disk.transport.info()["queues"] == []
    await disk.accept(VERSION_1)
    await disk.set_status(DRIVER_OK | FEATURES_OK)
    assert [queue["index"] for queue in disk.transport.info()["queues"]] == [0]


@pytest.mark.parametrize("size", [0, 3, 257, 0xFFFF])
async def test_a_queue_of_an_impossible_size_needs_a_reset(disk: AnyDriver, size: int) -> None:
    assert await disk.negotiate() & FEATURES_OK
    ring = await disk.set_queue(0)
    if isinstance(disk, PciDriver):
        await disk.set_common(0x1C, 2, 0)
        await disk.set_common(0x18, 2, size)
        await disk.set_common(0x1C, 2, 1)
    else:
        await disk.set(0x38, size)
    await disk.set_status(LIVE)
    assert await disk.status() == LIVE | NEEDS_RESET
    assert disk.transport.info()["queues"] == []
    ring.reset()
    await disk.start(0)
    await check_io(disk)


async def test_a_ring_outside_of_memory_needs_a_reset(disk: AnyDriver) -> None:
    assert await disk.negotiate() & FEATURES_OK
    ring = await disk.set_queue(0)
    kept, ring.used = ring.used, 0xFEE00000
    await disk.write_queue(0, ring)
    await disk.set_status(LIVE)
    assert await disk.status() == LIVE | NEEDS_RESET
    ring.used = kept
    await disk.start(0)
    await check_io(disk)


async def test_a_broken_ring_needs_a_reset_and_says_so(disk: AnyDriver) -> None:
    await disk.start(0)
    if isinstance(disk, PciDriver):
        await disk.set_common(0x10, 2, 2)
    ring = split(disk.rings[0])
    ring.set_avail(ring.avail_idx, 0x7FFF)
    ring.avail_idx += 1
    await disk.kick(0)
    if isinstance(disk, PciDriver):
        await disk.rig.vm.raised(disk.gsi(2))
    else:
        await disk.rig.vm.raised(disk.gsi)
        assert await disk.get(0x60) & 2
        await disk.set(0x64, 3)
        assert await disk.get(0x60) == 1
    assert await disk.status() == LIVE | NEEDS_RESET
    await disk.set_status(LIVE)
    assert await disk.status() == LIVE | NEEDS_RESET
    await disk.start(0)
    assert await disk.status() == LIVE
    await check_io(disk)


async def test_a_resize_shows_with_a_new_generation(disk: AnyDriver) -> None:
    await disk.start(0)
    if isinstance(disk, PciDriver):
        await disk.set_common(0x10, 2, 2)
    before = await disk.generation()
    device(disk).resize(4 << 20)
    gsi = disk.gsi(2) if isinstance(disk, PciDriver) else disk.gsi
    await disk.rig.vm.raised(gsi)
    assert await disk.generation() == before + 1
    assert await disk.config(0, 8) == 8192
    device(disk).notify_config()
    assert await disk.generation() == before + 1


async def test_a_resize_before_the_driver_interrupts_nobody(disk: AnyDriver) -> None:
    device(disk).resize(2 << 20)
    assert await disk.config(0, 8) == 4096
    assert not any(disk.rig.vm.is_raised(gsi) for gsi in disk.rig.vm.irqfds)


async def test_only_what_may_be_written_of_the_configuration_changes(disk: AnyDriver) -> None:
    wce = 1 << 11
    await disk.start(0, features=VERSION_1 | wce)
    space = [await disk.config(at, 1) for at in range(60)]
    for at in range(60):
        for size in range(1, min(8, 60 - at) + 1):
            if (at, size) != (32, 1):
                await disk.set_config(at, size, 0xA5A5A5A5A5A5A5A5 & (1 << 8 * size) - 1)
    await disk.set_config(32, 1, 2)
    assert [await disk.config(at, 1) for at in range(60)] == space
    await disk.set_config(32, 1, 0)
    assert await disk.config(32, 1) == 0
    assert not device(disk).writeback


async def test_requests_in_flight_end_before_a_reset_does(disk: AnyDriver) -> None:
    await disk.start(0, 1)
    for round in range(10):
        chains = [disk.disk_write(8 * n, bytes([round]) * 512) for n in range(8)]
        for chain in chains:
            await disk.submit(0, *chain)
            await disk.submit(1, *chain[:2], disk.room(1))
        await disk.set_status(0)
        # What the device took is complete, and nothing is written to the rings any more.
        frozen = [split(disk.rings[index]).used_idx for index in (0, 1)]
        await asyncio.sleep(0)
        assert frozen == [split(disk.rings[index]).used_idx for index in (0, 1)]
        await disk.start(0, 1)
    await check_io(disk, 0)
    await check_io(disk, 1)


@BOTH_LAYOUTS
async def test_a_restored_device_goes_on_in_a_copy(
    disk: AnyDriver, features: int, transport: str, tmp_path: Path
) -> None:
    """Suspended with requests in flight, saved, and restored over a copy of memory and disk."""
    await disk.start(0, features=features)
    await check_io(disk, 0, 0x11)
    heads = {}
    for n in range(6):
        chain = disk.disk_write(64 + n, bytes([n]) * 512)
        heads[await disk.submit(0, *chain)] = chain
    plugged = disk.rig.plugs.at(disk.slot)
    assert plugged is not None
    await disk.rig.plugs.suspend()
    state = plugged.function.save()
    memory = bytes(disk.rig.ram.view(0, disk.rig.ram.size))
    image = (tmp_path / "disk").read_bytes()

    async with Rig(pci=transport == "pci") as rig:
        make = pci_disk if transport == "pci" else mmio_disk
        other = await make(rig, tmp_path / "copy", num_queues=2)
        (tmp_path / "copy").write_bytes(image)
        rig.ram.write(0, memory)
        again = rig.plugs.at(other.slot)
        assert again is not None
        again.function.restore(state)
        other.rings = disk.rings
        for ring in other.rings.values():
            ring.memory = rig.memory
        await rig.plugs.resume()
        found: set[int] = set()
        while len(found) < len(heads):
            found.add((await other.used(0)).id)
        assert found == heads.keys()
        # The allocator that knows what is in use is the first rig's.
        rig.memory.regions[0].holes = disk.rig.memory.regions[0].holes
        await check_io(other, 0, 0x22)
        content = (tmp_path / "copy").read_bytes()
        for n in range(6):
            assert content[512 * (64 + n) : 512 * (65 + n)] == bytes([n]) * 512
        for ring in disk.rings.values():
            ring.memory = disk.rig.memory
    await disk.rig.plugs.resume()


@pytest.mark.parametrize("broken", [{}, {"transport": {}}, {"transport": []}, {"transport": 3}])
async def test_states_of_something_else_are_refused(
    disk: AnyDriver, broken: dict[str, object]
) -> None:
    plugged = disk.rig.plugs.at(disk.slot)
    assert plugged is not None
    with pytest.raises(ValueError, match=r"of something else|of another device"):
        plugged.function.restore({**plugged.function.save(), **broken} if broken else {})


@BOTH_LAYOUTS
async def test_suspending_and_resuming_loses_nothing(disk: AnyDriver, features: int) -> None:
    await disk.start(0, features=features)
    for fill in range(5):
        head = await disk.submit(0, *disk.disk_write(8, bytes([fill]) * 512))
        await disk.rig.plugs.suspend()
        await disk.rig.plugs.resume()
        assert (await disk.used(0)).id == head
    await check_io(disk)


async def test_a_status_written_while_it_closes_is_forgotten(disk: AnyDriver) -> None:
    """Two vCPUs: the one ejects the slot, the other steers the device."""
    await disk.start(0, 1)
    await disk.submit(0, *disk.disk_write(0, bytes(4096)))
    plugged = disk.rig.plugs.at(disk.slot)
    assert plugged is not None
    transport = disk.transport
    closing = asyncio.ensure_future(disk.rig.plugs.unplug(plugged))
    while not transport._lock.locked():  # noqa: ASYNC110  (closing has begun)
        await asyncio.sleep(0)
    others = [asyncio.ensure_future(transport.write_status(LIVE)) for _ in range(3)]
    others += [
        asyncio.ensure_future(transport.queue_ready(1)),
        asyncio.ensure_future(transport.queue_moved(0)),
    ]
    await asyncio.gather(closing, *others)
    assert plugged.gone.is_set()
    assert disk.rig.plugs.at(disk.slot) is None
    assert disk.rig.iothread.queues == 0


async def test_a_cancelled_unplug_ends_all_the_same(disk: AnyDriver) -> None:
    await disk.start(0, 1)
    for n in range(8):
        await disk.submit(n % 2, *disk.disk_write(n, bytes(4096)))
    plugged = disk.rig.plugs.at(disk.slot)
    assert plugged is not None
    closing = asyncio.ensure_future(disk.rig.plugs.unplug(plugged))
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert plugged.gone.is_set()
    assert disk.rig.plugs.at(disk.slot) is None


async def test_a_cancelled_reset_leaves_no_queue_behind(disk: AnyDriver) -> None:
    await disk.start(0, 1)
    await disk.submit(0, *disk.disk_write(0, bytes(4096)))
    resetting = asyncio.ensure_future(disk.set_status(0))
    await asyncio.sleep(0)
    resetting.cancel()
    await asyncio.gather(resetting, return_exceptions=True)
    assert disk.transport.info()["queues"] == []
    assert disk.rig.iothread.queues == 0
