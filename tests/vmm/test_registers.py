"""Windows in Python: what handlers are told, what they may do wrong, and what is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdev.registers import ALL, MMIO, PIO, Access, Bank, Bus, Register, Tell, Window

REGISTERS = (
    Register("select", 0, 2, writable=ALL),
    Register("quiet", 2, 2, 0x1234, writable=ALL),
    Register("told", 4, 4, 0x11111111, writable=0x00FF00FF, tell=Tell.WRITE),
    Register("change", 8, 2, writable=1, tell=Tell.CHANGE),
    Register("asked", 12, 4, 0x77777777, tell=Tell.READ),
    Register("row", 16, 2, 5, writable=ALL, tell=Tell.WRITE),
    Register("clears", 20, 4, 0xFF, writable=ALL, tell=Tell.ONE_CLEARS),
)


class Heard:
    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.answer: int | None = None
        self.fails = False

    async def __call__(self, access: Access) -> int | None:
        self.accesses.append(access)
        if self.fails:
            raise RuntimeError("a bug")
        return self.answer


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def bus() -> Iterator[Bus]:
    bus = Bus()
    yield bus
    bus.close()


@pytest.fixture
def window(bus: Bus, heard: Heard) -> Iterator[Window]:
    window = Window(24, REGISTERS, banks=[Bank(16, 18, "select", 3)], handler=heard)
    bus.place(window, MMIO, 0)
    yield window
    bus.remove(window)
    window.close()


async def test_reading_and_writing_what_is_stored(bus: Bus, window: Window, heard: Heard) -> None:
    assert await bus.access(MMIO, 2, 2) == 0x1234
    await bus.access(MMIO, 2, 2, 0xABCD)
    assert window.read("quiet") == 0xABCD
    window.write("quiet", 7)
    assert await bus.access(MMIO, 2, 2) == 7
    assert heard.accesses == []


async def test_each_told_register_of_a_wide_write_is_told(
    bus: Bus, window: Window, heard: Heard
) -> None:
    await bus.access(MMIO, 2, 8, 0x0001_8877_6655_4433)
    assert heard.accesses == [
        Access("told", 4, 4, 0, True, 0x88776655),
        Access("change", 8, 2, 0, True, 0x0001),
    ]
    assert window.read("quiet") == 0x4433
    assert window.read("told") == 0x11771155
    assert window.read("change") == 1


async def test_a_part_of_a_register_is_told_as_that(bus: Bus, window: Window, heard: Heard) -> None:
    await bus.access(MMIO, 6, 3, 0x00CCBB)
    assert heard.accesses == [
        Access("told", 6, 2, 0, True, 0xCCBB),
        Access("change", 8, 1, 0, True, 0),
    ]


async def test_the_row_is_the_told_registers(bus: Bus, window: Window, heard: Heard) -> None:
    await bus.access(MMIO, 0, 2, 2)
    await bus.access(MMIO, 14, 4, 0x0009_0000)
    assert heard.accesses == [Access("row", 16, 2, 2, True, 9)]
    assert [window.read("row", row) for row in range(3)] == [5, 5, 9]
    await bus.access(MMIO, 0, 2, 3)
    await bus.access(MMIO, 16, 2, 1)
    assert len(heard.accesses) == 1
    assert await bus.access(MMIO, 16, 2) == 0


async def test_an_answer_takes_the_place_of_its_register_alone(
    bus: Bus, window: Window, heard: Heard
) -> None:
    heard.answer = 0xAABBCCDDEE
    assert await bus.access(MMIO, 12, 4) == 0xBBCCDDEE
    assert await bus.access(MMIO, 13, 1) == 0xEE
    assert await bus.access(MMIO, 10, 8) == 0x0005_BBCC_DDEE_0000
    heard.answer = None
    assert await bus.access(MMIO, 12, 4) == 0


async def test_a_handler_that_fails_costs_one_access_and_few_lines(
    bus: Bus, window: Window, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    heard.fails = True
    with caplog.at_level(logging.WARNING, "vdev.registers"):
        for _ in range(1000):
            await bus.access(MMIO, 4, 4, 1)
            assert await bus.access(MMIO, 12, 4) == 0
    assert len(heard.accesses) == 2000
    assert 1 <= len(caplog.records) <= 20
    assert "RuntimeError: a bug" in caplog.text
    heard.fails = False
    heard.answer = 3
    assert await bus.access(MMIO, 12, 4) == 3


async def test_a_window_that_goes_while_it_answers(bus: Bus, window: Window) -> None:
    told: list[str] = []

    async def handler(access: Access) -> None:
        told.append(access.register)
        bus.remove(window)

    window.handler = handler
    await bus.access(MMIO, 4, 8, 0x1_00000000)
    assert told == ["told"]
    assert await bus.access(MMIO, 4, 4) == 0xFFFFFFFF
    bus.place(window, PIO, 0x100)
    assert await bus.access(PIO, 0x104, 4) == window.read("told")


def test_a_closed_window_is_not_memory_any_more(bus: Bus) -> None:
    window = Window(24, REGISTERS, banks=[Bank(16, 18, "select", 3)])
    window.close()
    for use in (
        lambda: window.read("quiet"),
        lambda: window.write("quiet", 1),
        lambda: window.set_bits("quiet", 1),
        lambda: bus.place(window, MMIO, 0),
    ):
        with pytest.raises(TypeError):
            use()
    assert not bus.holds(window)


@pytest.mark.parametrize("size", [0, 9, 16])
async def test_impossible_sizes_are_refused(bus: Bus, size: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await bus.access(MMIO, 0, size)


def test_state_goes_round(window: Window) -> None:
    window.write("row", 9, 2)
    window.write("told", 0xFFFFFFFF)
    state = window.save()
    window.write("row", 1, 2)
    window.write("told", 0)
    window.restore(state)
    assert window.save() == state
    assert window.read("row", 2) == 9


@pytest.mark.parametrize(
    "change",
    [
        {"told": [1 << 32]},
        {"told": [-1]},
        {"told": []},
        {"told": [1, 2]},
        {"told": 5},
        {"told": None},
        {"told": ["1"]},
        {"told": [None]},
        {"told": [1.5]},
        {"row": [1, 2]},
        {"other": [1]},
    ],
    ids=str,
)
def test_states_of_something_else_are_refused(window: Window, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="register"):
        window.restore({**window.save(), **change})


@given(
    st.lists(
        st.tuples(st.integers(0, 26), st.integers(1, 8), st.none() | st.integers(0, (1 << 64) - 1)),
        max_size=40,
    )
)
async def test_a_model_of_bytes_agrees(steps: list[tuple[int, int, int | None]]) -> None:
    """The window beside a model that has never heard of words."""
    bus, heard = Bus(), Heard()
    window = Window(24, REGISTERS, banks=[Bank(16, 18, "select", 3)], handler=heard)
    bus.place(window, MMIO, 0x1000)
    at = {r.offset + n: (r, n) for r in REGISTERS for n in range(r.size)}
    model = {
        (row, offset): r.initial >> 8 * n & 0xFF
        for offset, (r, n) in at.items()
        for row in (range(3) if r.name == "row" else range(1))
    }

    def place(offset: int) -> tuple[int, int]:
        row = model[0, 0] | model[0, 1] << 8
        return (row if offset in (16, 17) else 0), offset

    for offset, size, value in steps:
        inside = offset + size <= 24
        if value is None:
            want = 0
            for n in range(size):
                byte = model.get(place(offset + n), 0) if inside else 0xFF
                if inside and at.get(offset + n, (None,))[0] is REGISTERS[4]:
                    byte = 0
                want |= byte << 8 * n
            assert await bus.access(MMIO, 0x1000 + offset, size) == want
            continue
        value &= (1 << 8 * size) - 1
        await bus.access(MMIO, 0x1000 + offset, size, value)
        for n in range(size if inside else 0):
            key = place(offset + n)
            if key not in model:
                continue
            register, byte_at = at[offset + n]
            mask, byte = register.writable >> 8 * byte_at & 0xFF, value >> 8 * n & 0xFF
            if register.tell & Tell.ONE_CLEARS:
                model[key] &= ~(byte & mask)
            else:
                model[key] = model[key] & ~mask | byte & mask
    bus.remove(window)
    window.close()
    bus.close()
