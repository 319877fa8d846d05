"""PCI as its guest sees it: configuration space, BAR, MSI-X, the virtio structures in the BAR."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.vmm.driver import DRIVER_OK, NEEDS_RESET, PciDriver, pci_disk
from tests.vmm.rig import Rig
from tests.vmm.served import readable
from vdev.errors import UserError
from vdev.virtio.pci import NO_VECTOR
from vdev.vmm.devices.rng import RngDevice
from vdev.vmm.layout import (
    BAR_BASE,
    BAR_END,
    ECAM_BASE,
    IOAPIC_BASE,
    KVM_TSS,
    LAPIC_BASE,
    MMIO_BASE,
)
from vdev.vmm.pci.bus import SLOTS

COMMAND, BAR0 = 4, 0x10


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


@pytest_asyncio.fixture
async def disk(rig: Rig, tmp_path: Path) -> AsyncIterator[PciDriver]:
    driver = await pci_disk(rig, tmp_path / "disk", num_queues=2)
    yield driver
    driver.close()


async def rng_driver(rig: Rig, id: str = "rng") -> PciDriver:
    driver = PciDriver(rig, rig.plug(id, RngDevice(iothreads=[rig.iothread])).slot)
    await driver.probe()
    await driver.enable_msix()
    return driver


async def check_entropy(driver: PciDriver) -> None:
    room = driver.room(64)
    assert await driver.request(0, room) == 64
    assert driver.content(room) != bytes(64)


# -- the bus --------------------------------------------------------------------------------------


async def test_only_what_is_plugged_in_is_found(rig: Rig, disk: PciDriver) -> None:
    found = []
    for slot in range(SLOTS):
        for function in range(8):
            at = ECAM_BASE + (slot << 15 | function << 12)
            if await rig.read(at, 4) != 0xFFFFFFFF:
                found.append((slot, function))
    assert found == [(0, 0), (disk.slot, 0)]
    assert await rig.read(ECAM_BASE + 10, 2) == 0x0600
    assert await disk.cfg(0x100, 4) == 0xFFFFFFFF


async def test_slots_fill_and_empty(rig: Rig) -> None:
    plugged = [rig.plug(f"rng{n}", RngDevice(iothreads=[rig.iothread])) for n in range(SLOTS - 1)]
    extra = RngDevice(iothreads=[rig.iothread])
    with pytest.raises(UserError, match="no slot free"):
        rig.plug("extra", extra)
    bars = {await rig.read(ECAM_BASE + (p.slot << 15) + BAR0, 4) for p in plugged}
    assert len(bars) == SLOTS - 1
    await rig.plugs.unplug(plugged[7])
    again = rig.plug("extra", extra)
    assert again.slot == plugged[7].slot
    assert await rig.read(ECAM_BASE + (again.slot << 15) + BAR0, 4) in bars


async def test_ids_and_read_only_registers(disk: PciDriver) -> None:
    before = [await disk.cfg(at, 1) for at in range(256)]
    assert before[0:4] == [0xF4, 0x1A, 0x42, 0x10]
    assert before[8] >= 1
    for at in (*range(4), *range(6, 12), 0x2C, 0x2E, 0x34, *range(0x14, 0x2C)):
        await disk.set_cfg(at, 1, 0xA5)
    assert [await disk.cfg(at, 1) for at in range(256)] == before
    await disk.set_cfg(0x3C, 1, 11)
    assert await disk.cfg(0x3C, 1) == 11


async def test_capabilities_lie_inside_and_name_what_is_there(disk: PciDriver) -> None:
    assert sorted(kind for kind, _ in disk.capabilities) == [9, 9, 9, 9, 9, 0x11]
    assert disk.structures.keys() == {1, 2, 3, 4, 5}
    assert disk.vectors == 3
    assert disk.table & 7 == 0
    assert disk.pending & 7 == 0
    spans = []
    for kind in (1, 2, 3, 4):
        at, offset = disk.structures[kind]
        length = await disk.cfg(at + 12, 4)
        assert offset + length <= disk.bar_size
        spans.append((offset, offset + length))
    spans += [(disk.table, disk.table + 16 * disk.vectors), (disk.pending, disk.pending + 8)]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


# -- the BAR --------------------------------------------------------------------------------------


async def test_a_bar_is_sized_and_moves(rig: Rig, disk: PciDriver) -> None:
    assert disk.bar_size.bit_count() == 1
    old = disk.bar
    await disk.move(old + 16 * disk.bar_size)
    assert await rig.read(old, 4) == 0xFFFFFFFF
    assert await disk.common(0x12, 2) == 2
    assert {address for address, _ in rig.vm.ioeventfds} == {
        disk.bar + disk.structures[2][1] + 4 * n for n in range(2)
    }
    await disk.start(0)
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513


async def test_a_bar_moves_under_a_running_device(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0)
    head = await disk.submit(0, *disk.disk_read(0, 512))
    await disk.move(disk.bar + 4 * disk.bar_size)
    assert (await disk.used(0)).id == head
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513


async def test_without_memory_enabled_nothing_answers(rig: Rig, disk: PciDriver) -> None:
    await disk.set_cfg(COMMAND, 2, 4)
    for offset in range(0, disk.bar_size, 0x1000):
        assert await rig.read(disk.bar + offset, 4) == 0xFFFFFFFF
    assert rig.vm.ioeventfds == {}
    await disk.set_cfg(COMMAND, 4, 0xFFFFFFFF)
    assert await disk.cfg(COMMAND, 4) == 0x00100406
    assert await disk.common(0x12, 2) == 2


@pytest.mark.parametrize(
    "address",
    [0, 0x7000, 0x100000, MMIO_BASE, BAR_END, ECAM_BASE, IOAPIC_BASE, LAPIC_BASE, KVM_TSS, 1 << 31]
    + [ECAM_BASE + (slot << 15) for slot in (0, 1, 2, 31)]
    + [0xFFFFFFFF],
)
async def test_a_bar_answers_in_the_bridges_window_alone(
    rig: Rig, disk: PciDriver, address: int
) -> None:
    was = disk.bar
    await disk.set_cfg(BAR0, 4, address)
    at = await disk.cfg(BAR0, 4)
    assert at == address & -disk.bar_size
    assert rig.vm.ioeventfds == {}
    assert await rig.read(was, 4) == 0xFFFFFFFF
    # Who comes next has what it needs.
    rng = await rng_driver(rig)
    assert BAR_BASE <= rng.bar < BAR_END
    await rng.start(0)
    await check_entropy(rng)
    await disk.set_cfg(BAR0, 4, rng.bar + 0x100000)
    disk.bar = rng.bar + 0x100000
    assert await disk.common(0x12, 2) == 2
    rng.close()


async def test_of_two_bars_in_one_place_the_first_answers(rig: Rig, disk: PciDriver) -> None:
    rng = await rng_driver(rig)
    home = rng.bar
    await rng.set_cfg(BAR0, 4, disk.bar)
    assert await disk.common(0x12, 2) == 2
    await disk.start(0)
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513
    assert await rig.read(home, 4) == 0xFFFFFFFF
    await rng.move(home)
    await rng.start(0)
    await check_entropy(rng)
    rng.close()


async def test_a_reset_brings_a_bar_home(rig: Rig, disk: PciDriver) -> None:
    home = disk.bar
    await disk.start(0)
    await disk.move(home + 8 * disk.bar_size)
    rng = rig.plug("rng", RngDevice(iothreads=[rig.iothread]))
    await rig.plugs.reset()
    assert await disk.cfg(BAR0, 4) == home
    assert await disk.cfg(COMMAND, 2) == 0
    assert await rig.read(ECAM_BASE + (rng.slot << 15) + BAR0, 4) != home
    assert not rig.vm.ioeventfds
    await disk.probe()
    await disk.enable_msix()
    await disk.start(0)
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513


# -- the window in configuration space (virtio 1.3, section 4.1.4.9) ------------------------------


async def windowed(disk: PciDriver, offset: int, size: int, value: int | None = None) -> int:
    at = disk.structures[5][0]
    await disk.set_cfg(at + 4, 1, 0)
    await disk.set_cfg(at + 8, 4, offset)
    await disk.set_cfg(at + 12, 4, size)
    if value is None:
        return await disk.cfg(at + 16, size if size in (1, 2, 4) else 4)
    await disk.set_cfg(at + 16, size if size in (1, 2, 4) else 4, value)
    return 0


async def test_the_bar_is_reached_through_the_window(disk: PciDriver) -> None:
    assert await windowed(disk, 0x12, 2) == 2
    await windowed(disk, 0x14, 1, 1)
    assert await disk.status() == 1
    assert await windowed(disk, 0x14, 1) == 1
    assert await windowed(disk, 0x12, 1) == 2
    await disk.start(0)
    head = disk.rings[0].add(disk.disk_read(0, 512))
    disk.rings[0].offer(head)
    await windowed(disk, disk.structures[2][1], 2, 0)
    assert (await disk.used(0)).id == head


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 3), (0, 8), (1, 2), (2, 4), (0xFFFFFFFC, 4), (0xFFFFFFFF, 1), (0, 0xFFFFFFFF)],
)
async def test_a_window_of_an_impossible_kind_reads_as_ones(
    disk: PciDriver, offset: int, size: int
) -> None:
    ones = (1 << 8 * size) - 1 if size in (1, 2) else 0xFFFFFFFF
    assert await windowed(disk, offset, size) == ones
    await windowed(disk, offset, size, 0)
    assert await windowed(disk, disk.bar_size, 1) == 0xFF
    await disk.set_cfg(disk.structures[5][0] + 4, 1, 1)
    assert await disk.cfg(disk.structures[5][0] + 16, 4) == 0xFFFFFFFF


# -- MSI-X ----------------------------------------------------------------------------------------


async def test_a_masked_vector_waits(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0)
    gsi = disk.gsi(0)
    await disk.mask(0, True)
    assert gsi not in rig.vm.irqfds
    await disk.submit(0, *disk.disk_read(0, 512))
    await readable(disk.transport.call_fd(0))
    assert await disk.pending_bits() == 1
    assert await rig.read(disk.bar + disk.pending, 1) == 1
    assert await rig.read(disk.bar + disk.pending + 1, 1) == 0
    assert await rig.read(disk.bar + disk.pending + 4, 4) == 0
    await disk.mask(0, False)
    assert await disk.pending_bits() == 0
    await rig.vm.raised(gsi)
    assert disk.rings[0].pop() is not None


async def test_a_masked_function_waits(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0, 1)
    await disk.set_cfg(disk.msix + 2, 2, 0xC000)
    assert await disk.cfg(disk.msix + 2, 2) == 0xC002
    assert not rig.vm.irqfds.keys() & {24, 25, 26}
    for queue in (0, 1):
        await disk.submit(queue, *disk.disk_read(0, 512))
        await readable(disk.transport.call_fd(queue))
    assert await disk.pending_bits() == 3
    # A write of the whole dword is one of the control word too.
    await disk.set_cfg(disk.msix, 4, 0x8000 << 16)
    for queue in (0, 1):
        await rig.vm.raised(disk.gsi(queue))


async def test_pending_interrupts_do_not_outlive_a_reset(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0)
    await disk.mask(0, True)
    await disk.submit(0, *disk.disk_read(0, 512))
    await readable(disk.transport.call_fd(0))
    await rig.plugs.reset()
    await disk.probe()
    assert await disk.pending_bits() == 0
    await disk.enable_msix()
    assert not rig.vm.is_raised(disk.gsi(0))


async def test_a_vector_changes_its_message(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0)
    before = disk.gsi(0)
    await disk.set_vector(0, 0xFEE01000, 0x55)
    assert rig.vm.gsi_of(0xFEE01000, 0x55) == before
    await disk.submit(0, *disk.disk_read(0, 512))
    await rig.vm.raised(before)


@pytest.mark.parametrize("address", [1 << 32, 0xFFFFFFFFFFFFFFFC, 0xFF << 32 | 0xFEE00000])
async def test_a_message_that_kvm_refuses_spoils_nothing(
    rig: Rig, disk: PciDriver, address: int
) -> None:
    await disk.start(0, 1)
    await disk.set_vector(0, address, 0x41)
    assert 24 not in rig.vm.irqfds
    await disk.set_vector(1, *disk.message(1))
    assert await disk.request(1, *disk.disk_read(0, 512)) == 513
    rng = await rng_driver(rig)
    await rng.start(0)
    await check_entropy(rng)
    await disk.set_vector(0, *disk.message(0))
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513
    await disk.set_vector(0, address, 0x41)
    # A new VM, as after a reset of the machine.
    rig.interrupts.detach()
    rig.plugs.detach()
    rig.vm.irqfds.clear()
    rig.vm.ioeventfds.clear()
    rig.attach()
    assert await disk.request(1, *disk.disk_read(0, 512)) == 513
    rng.close()


async def test_the_same_message_again_costs_nothing(rig: Rig, disk: PciDriver) -> None:
    changes = rig.vm.changes
    lines, routes = len(rig.interrupts._lines), len(rig.interrupts._routes)
    for _ in range(2000):
        await disk.mask(0, True)
        await disk.mask(0, False)
        await disk.set_cfg(COMMAND, 2, 0)
        await disk.set_cfg(COMMAND, 2, 6)
    assert rig.vm.changes == changes
    assert (len(rig.interrupts._lines), len(rig.interrupts._routes)) == (lines, routes)
    assert len(rig.vm.ioeventfds) == 2


# -- virtio structures ----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [3, 4, 0x7FFF, 0xFFFE])
async def test_vectors_that_do_not_exist_are_not_given(disk: PciDriver, vector: int) -> None:
    await disk.set_common(0x10, 2, vector)
    assert await disk.common(0x10, 2) == NO_VECTOR
    await disk.set_common(0x16, 2, 1)
    await disk.set_common(0x1A, 2, vector)
    assert await disk.common(0x1A, 2) == NO_VECTOR
    await disk.set_common(0x1A, 2, 2)
    assert await disk.common(0x1A, 2) == 2


async def test_wide_writes_do_not_smuggle_vectors_in(rig: Rig, disk: PciDriver) -> None:
    """Driver features and config_vector in one; queue_select to queue_enable in one."""
    await disk.set_common(0x0C, 8, 0x1234 << 32)
    assert await disk.common(0x10, 2) == NO_VECTOR
    await disk.start(0)
    await disk.set_common(0x16, 8, 0x0001_1234_0020_0001)
    assert await disk.common(0x16, 2) == 1
    assert await disk.common(0x1A, 2) == NO_VECTOR
    # The queue was enabled with the rest: its addresses are the ring's of nobody, at 0.
    assert await disk.common(0x1C, 2) == 1
    assert await disk.request(0, *disk.disk_read(0, 512)) == 513
    await disk.set_common(0x18, 4, 0x1234 << 16)
    assert await disk.common(0x1A, 2) == NO_VECTOR


async def test_a_queue_without_a_vector_is_polled(disk: PciDriver) -> None:
    await disk.start(0)
    await disk.set_common(0x1A, 2, NO_VECTOR)
    await disk.submit(0, *disk.disk_read(0, 512))
    await disk.rig.plugs.suspend()
    await disk.rig.plugs.resume()
    assert disk.rings[0].pop() is not None
    assert not disk.rig.vm.is_raised(disk.gsi(0))
    await disk.set_common(0x1A, 2, 2)
    await disk.submit(0, *disk.disk_read(0, 512))
    await disk.rig.vm.raised(disk.gsi(2))


async def test_queues_that_do_not_exist_read_as_zero(disk: PciDriver) -> None:
    for select in (2, 3, 0xFF, 0x100, 0xFFFF):
        await disk.set_common(0x16, 2, select)
        for at in range(0x18, 0x40):
            await disk.set_common(at, 1, 0xFF)
            assert await disk.common(at, 1) == 0
    await disk.start(0, 1)
    assert await disk.request(1, *disk.disk_read(0, 512)) == 513


async def test_a_function_that_leaves_under_load(rig: Rig, disk: PciDriver) -> None:
    await disk.start(0, 1)
    for n in range(8):
        await disk.submit(n % 2, *disk.disk_write(n, bytes(4096)))
    await rig.outb(0x610 + 12, 1 << disk.slot, 4)
    assert rig.outcomes == [f"ejected {disk.slot}"]
    assert rig.plugs.at(disk.slot) is None
    assert await disk.cfg(0, 4) == 0xFFFFFFFF
    assert await rig.read(disk.bar, 4) == 0xFFFFFFFF
    assert rig.vm.ioeventfds == {}
    rng = await rng_driver(rig)
    assert rng.slot == disk.slot
    await rng.start(0)
    await check_entropy(rng)
    assert await rng.status() & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    rng.close()
