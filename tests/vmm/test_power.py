"""Sleep, reset, panic, and the event block, by accesses to their ports."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.vmm.rig import Rig
from vdev.vmm.acpi.registers import SLEEP_S5, Event
from vdev.vmm.devices.rng import RngDevice
from vdev.vmm.layout import GED_GSI, HOTPLUG_PORT, POWER_PORT, PVPANIC_PORT

SLEEP, STATUS, RESET = POWER_PORT, POWER_PORT + 1, POWER_PORT + 2
EVENTS, INSERTED, REQUESTED, EJECT = (HOTPLUG_PORT + at for at in (0, 4, 8, 12))


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


async def test_only_s5_switches_off(rig: Rig) -> None:
    for value in range(256):
        await rig.outb(SLEEP, value)
    # SLP_EN and the type count, what is reserved around them does not.
    assert rig.outcomes == ["shutdown"] * 16
    assert await rig.inb(SLEEP) == 0
    rig.outcomes.clear()
    await rig.outb(SLEEP, SLEEP_S5)
    assert rig.outcomes == ["shutdown"]


async def test_only_its_value_resets(rig: Rig) -> None:
    for value in range(256):
        await rig.outb(RESET, value)
    assert rig.outcomes == ["reset"]
    await rig.outb(0x64, 0xFE)
    assert rig.outcomes == ["reset", "reset"]
    for value in range(0xFE):
        await rig.outb(0x64, value)
    assert len(rig.outcomes) == 2


async def test_wide_writes_reach_each_register(rig: Rig) -> None:
    await rig.outb(STATUS, 0x0100, 2)
    await rig.outb(SLEEP, SLEEP_S5, 4)
    assert rig.outcomes == ["reset", "shutdown"]
    await rig.outb(SLEEP, SLEEP_S5, 8)
    assert len(rig.outcomes) == 2


async def test_a_panic_is_told(rig: Rig) -> None:
    assert await rig.inb(PVPANIC_PORT) == 3
    await rig.outb(PVPANIC_PORT, 2)
    assert rig.outcomes == []
    await rig.outb(PVPANIC_PORT, 1)
    assert rig.outcomes == ["panic"]


async def test_events_are_raised_and_cleared(rig: Rig) -> None:
    rig.power.raise_event(Event.POWER_BUTTON)
    rig.power.raise_event(Event.SLOTS_INSERTED, 5)
    rig.power.raise_event(Event.SLOTS_REQUESTED, 31)
    await rig.vm.raised(GED_GSI)
    assert await rig.inb(EVENTS, 4) == 7
    assert await rig.inb(INSERTED, 4) == 1 << 5
    assert await rig.inb(REQUESTED, 4) == 1 << 31
    await rig.outb(EVENTS, Event.POWER_BUTTON, 4)
    assert await rig.inb(EVENTS, 4) == 6
    # What comes between reading and clearing stays.
    rig.power.raise_event(Event.SLOTS_INSERTED, 6)
    await rig.outb(INSERTED, 1 << 5, 4)
    assert await rig.inb(INSERTED, 4) == 1 << 6
    await rig.outb(EVENTS, 0, 4)
    assert await rig.inb(EVENTS, 4) == 6
    await rig.outb(REQUESTED + 3, 0x80)
    assert await rig.inb(REQUESTED, 4) == 0


async def test_state_goes_round(rig: Rig) -> None:
    rig.power.raise_event(Event.SLOTS_INSERTED, 5)
    state = rig.power.save()
    rig.power.reset()
    assert await rig.inb(EVENTS, 4) == 0
    assert await rig.inb(INSERTED, 4) == 0
    rig.power.restore(state)
    assert await rig.inb(INSERTED, 4) == 1 << 5


@pytest.mark.parametrize("width", [1, 2, 4])
async def test_ejecting_unasked_and_into_the_void(rig: Rig, width: int) -> None:
    plugged = [rig.plug(f"rng{n}", RngDevice(iothreads=[rig.iothread])) for n in range(20)]
    assert await rig.inb(EJECT, 4) == 0
    slots = sorted({0, 3, 17, 31})
    bits = sum(1 << slot for slot in slots)
    for part in range(0, 4, width):
        await rig.outb(EJECT + part, bits >> 8 * part & (1 << 8 * width) - 1, width)
    assert rig.outcomes == [f"ejected {slot}" for slot in slots]
    assert {p.slot for p in plugged} - {p.slot for p in rig.plugs} == {3, 17}
    await rig.outb(EJECT, 1 << 3, 4)
    assert len(list(rig.plugs)) == 18
    await rig.outb(EJECT, 0xFFFFFFFF, 4)
    assert list(rig.plugs) == []
