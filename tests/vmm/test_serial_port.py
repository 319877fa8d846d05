"""The serial port between the event loop and the guest's driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.vmm.rig import Rig
from vdev.vmm.layout import SERIAL_GSI, SERIAL_PORT

DATA, IER, FCR, LCR, MCR, LSR = (SERIAL_PORT + at for at in range(6))


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


async def receive(rig: Rig, size: int) -> bytes:
    """As an interrupt handler: until `size` bytes are there."""
    got = bytearray()
    await rig.outb(IER, 1)
    while len(got) < size:
        await rig.vm.raised(SERIAL_GSI)
        while await rig.inb(LSR) & 1:
            got.append(await rig.inb(DATA))
    return bytes(got)


async def test_what_the_guest_writes_comes_out(rig: Rig) -> None:
    text = bytes(range(256)) * 20
    for byte in text:
        await rig.outb(DATA, byte)
    rig.serial.flush()
    assert rig.output == text
    assert rig.serial.stats() == {"sent": len(text), "dropped": 0, "received": 0}


async def test_the_event_loop_reads_by_itself(rig: Rig) -> None:
    await rig.outb(DATA, 0x41)
    await rig.heard.wait()
    assert rig.output == b"A"


async def test_more_than_the_fifo_holds_waits(rig: Rig) -> None:
    text = bytes(range(256)) * 3
    writing = asyncio.ensure_future(rig.serial.write(text))
    await asyncio.sleep(0)
    assert not writing.done()
    assert await receive(rig, len(text)) == text
    await writing
    assert rig.serial.stats()["received"] == len(text)


async def test_writers_take_turns(rig: Rig) -> None:
    parts = [bytes([n]) * 100 for n in range(5)]
    writing = asyncio.gather(*(rig.serial.write(part) for part in parts))
    assert await receive(rig, 500) == b"".join(parts)
    await writing


@pytest.mark.parametrize(("port", "value"), [(FCR, 3), (FCR, 2), (FCR, 7)])
async def test_a_guest_that_clears_its_fifo_goes_on(rig: Rig, port: int, value: int) -> None:
    writing = asyncio.ensure_future(rig.serial.write(b"x" * 64 + b"y" * 10))
    await asyncio.sleep(0)
    await rig.outb(port, value)
    assert await receive(rig, 10) == b"y" * 10
    await writing


async def test_a_reset_goes_on(rig: Rig) -> None:
    writing = asyncio.ensure_future(rig.serial.write(b"x" * 64 + b"y" * 10))
    await asyncio.sleep(0)
    rig.serial.reset()
    assert await receive(rig, 10) == b"y" * 10
    await writing


async def test_loopback_ends(rig: Rig) -> None:
    await rig.outb(MCR, 0x10)
    writing = asyncio.ensure_future(rig.serial.write(b"abc"))
    await asyncio.sleep(0)
    assert await rig.inb(LSR) == 0x60
    await rig.outb(MCR, 0x08)
    assert await receive(rig, 3) == b"abc"
    await writing


async def test_state_goes_round(rig: Rig) -> None:
    await rig.serial.write(b"kept")
    await rig.outb(LCR, 0x1B)
    state = rig.serial.save()
    async with Rig() as other:
        other.serial.restore(state)
        assert await other.inb(LCR) == 0x1B
        assert await receive(other, 4) == b"kept"
        for broken in (b"", state[:-1], state + b"x", b"\xff" * len(state)):
            with pytest.raises(ValueError, match="serial port"):
                other.serial.restore(broken)
        assert await other.inb(LCR) == 0x1B
