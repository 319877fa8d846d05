"""virtio-mmio as its driver sees it: what is particular to section 4.2 of virtio 1.3."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.vmm.driver import MmioDriver, mmio_disk
from tests.vmm.rig import Rig
from vdev.errors import UserError
from vdev.vmm.devices.rng import RngDevice
from vdev.vmm.mmio import SLOTS_MAX


@pytest_asyncio.fixture
async def disk(tmp_path: Path) -> AsyncIterator[MmioDriver]:
    async with Rig(pci=False) as rig:
        driver = await mmio_disk(rig, tmp_path / "disk", num_queues=2)
        yield driver
        driver.close()


async def test_the_constants(disk: MmioDriver) -> None:
    assert [await disk.get(at) for at in (0x00, 0x04, 0x08)] == [0x74726976, 2, 2]
    for at in (0x00, 0x04, 0x08, 0x0C, 0x10, 0x34, 0x60, 0xB0, 0xB4, 0xB8, 0xBC, 0xFC):
        before = await disk.get(at)
        await disk.set(at, ~before & 0xFFFFFFFF)
        assert await disk.get(at) == before
    # No shared memory of any id.
    for region in (0, 1, 0xFFFFFFFF):
        await disk.set(0xAC, region)
        assert [await disk.get(at) for at in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFFFFFF] * 4


async def test_only_the_first_byte_of_status_counts(disk: MmioDriver) -> None:
    await disk.start(0)
    for at in (0x71, 0x72, 0x73):
        await disk.rig.write(disk.base + at, 1, 0)
    assert await disk.status() == 0xF
    await disk.rig.write(disk.base + 0x70, 1, 0)
    assert await disk.status() == 0


async def test_queues_that_do_not_exist_read_as_zero(disk: MmioDriver) -> None:
    for select in (2, 0x100, 0xFFFFFFFF):
        await disk.set(0x30, select)
        for at in (0x34, 0x38, 0x44, 0x80, 0x84, 0x90, 0xA0):
            await disk.set(at, 0xFFFFFFFF)
            assert await disk.get(at) == 0
    await disk.start(0, 1)
    assert await disk.request(1, *disk.disk_read(0, 512)) == 513


async def test_a_queue_that_is_taken_back_stops_and_starts_anew(disk: MmioDriver) -> None:
    await disk.start(0, 1)
    for _ in range(3):
        assert await disk.request(0, *disk.disk_read(0, 512)) == 513
        await disk.set(0x30, 0)
        await disk.set(0x44, 0)
        assert [queue["index"] for queue in disk.transport.info()["queues"]] == [1]
        await disk.set_queue(0)
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513
    assert await disk.request(1, *disk.disk_read(0, 512)) == 513


async def test_notifications_of_other_queues_are_lost(disk: MmioDriver) -> None:
    await disk.start(0)
    for value in (2, 3, 0xFFFFFFFF):
        assert not disk.rig.vm.notify(disk.base + 0x50, 4, value)
        await disk.set(0x50, value)
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513


async def test_only_a_change_is_acknowledged(disk: MmioDriver) -> None:
    assert await disk.get(0x60) == 0
    await disk.start(0)
    assert await disk.get(0x60) == 1
    disk.transport.device.notify_config()
    assert await disk.get(0x60) == 3
    await disk.set(0x64, 1)
    assert await disk.get(0x60) == 3
    await disk.set(0x64, 2)
    assert await disk.get(0x60) == 1
    await disk.set_status(0)
    assert await disk.get(0x60) == 0


async def test_used_buffers_are_acknowledged_without_the_monitor(disk: MmioDriver) -> None:
    """KVM takes the writes that change nothing, and those alone."""
    await disk.start(0)
    disk.transport.device.notify_config()
    assert disk.rig.vm.notify(disk.base + 0x64, 4, 1)
    assert await disk.get(0x60) == 3
    for size, value in ((4, 2), (4, 3), (4, 0), (1, 1), (2, 1)):
        assert not disk.rig.vm.notify(disk.base + 0x64, size, value)
    # Nor is it any queue's kick.
    assert disk.rig.vm.ioeventfds[disk.base + 0x64, 1] not in disk.transport.kicks


async def test_slots_are_as_many_as_pins() -> None:
    async with Rig(pci=False) as rig:
        for n in range(SLOTS_MAX):
            rig.plug(f"rng{n}", RngDevice(iothreads=[rig.iothread]))
        extra = RngDevice(iothreads=[rig.iothread])
        with pytest.raises(UserError, match="at most"):
            rig.plug("extra", extra)
        extra.close()
        last = MmioDriver(rig, SLOTS_MAX - 1)
        await last.start(0)
        assert await last.request(0, last.room(8)) == 8
        last.close()
