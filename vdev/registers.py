"""Registers that are data: windows of the guest's address spaces, answered in C.

A `Window` is a table of `Register`s.  The vCPU threads read and write its stored bytes within the
bits that the guest may change; only what the table marks with `Tell` reaches the event loop, where
the window's handler answers while the vCPU waits.  Banked registers (those that a selector
switches, as virtio's queue registers) exist once a row.
"""

from __future__ import annotations

import enum
import logging
import os
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vdev._native import ffi, lib
from vdev.iothread import new_token
from vdev.ratelog import RateLimitedLog

MMIO: int = lib.VMM_SPACE_MMIO
PIO: int = lib.VMM_SPACE_PIO
ALL = -1

_log = logging.getLogger("vdev.registers")


class Tell(enum.IntFlag):
    """What the handler is told of, and what writing does; see enum vmm_register_flag."""

    NOTHING = 0
    WRITE = lib.VMM_TELL_WRITE
    CHANGE = lib.VMM_TELL_CHANGE
    READ = lib.VMM_TELL_READ
    ONE_CLEARS = lib.VMM_WRITE_ONE_CLEARS
    ACKNOWLEDGES = lib.VMM_ACKNOWLEDGES


class Register(NamedTuple):
    """`size` bytes at `offset`, little endian.

    writable: the bits that the guest may change, ALL = every one.  tell: of what the handler hears.
    """

    name: str
    offset: int
    size: int
    initial: int = 0
    writable: int = 0
    tell: Tell = Tell.NOTHING


class Bank(NamedTuple):
    """The bytes from `offset` to `end` exist `rows` times; the register `selector` chooses."""

    offset: int
    end: int
    selector: str
    rows: int


class Access(NamedTuple):
    """A told access to `size` bytes of a register, which begin at `offset` of the window.

    row: of its bank, or 0.  value: what was written; its bytes beyond `size` are zero.  Where one
    access of the guest's touches several told registers, each is told by itself, also one that
    asked for `Tell.CHANGE` and kept its value."""

    register: str
    offset: int
    size: int
    row: int
    write: bool
    value: int


Handler = Callable[[Access], Awaitable[int | None]]


class NativeWindow:
    """A window that C answers alone; `native` is its struct vmm_window *, the caller's."""

    handler: Handler | None = None

    def __init__(self, native: Any, token: int | None = None) -> None:
        self.native = native
        self.token = new_token() if token is None else token

    def told_parts(self, told: Any) -> Iterator[Access]:
        """What a struct vmm_access does to each told register."""
        yield from ()


class Window(NativeWindow):
    """Registers at some place of an address space; `close` it when it is on no bus."""

    def __init__(
        self,
        size: int,
        registers: Iterable[Register],
        *,
        banks: Sequence[Bank] = (),
        handler: Handler | None = None,
    ) -> None:
        self.size = size
        self.handler = handler
        self.registers = {register.name: register for register in registers}
        self._at: dict[int, Register] = {}
        initial, writable, flags = bytearray(size), bytearray(size), bytearray(size)
        for register in self.registers.values():
            span = slice(register.offset, register.offset + register.size)
            initial[span] = register.initial.to_bytes(register.size, "little")
            mask = register.writable & ((1 << 8 * register.size) - 1)
            writable[span] = mask.to_bytes(register.size, "little")
            flags[span] = bytes([register.tell]) * register.size
            self._at.update(dict.fromkeys(range(span.start, span.stop), register))
        self._rows = [(bank.offset, bank.end, bank.rows) for bank in banks]
        config = ffi.new("struct vmm_window_config *")
        token = new_token()
        config.token = token
        config.size = size
        config.num_banks = len(banks)
        kept = [ffi.from_buffer("uint8_t[]", part) for part in (initial, writable, flags)]
        config.initial, config.writable, config.flags = kept
        for at, bank in enumerate(banks):
            selector = self.registers[bank.selector]
            config.bank[at] = {
                "offset": bank.offset,
                "size": bank.end - bank.offset,
                "selector": selector.offset,
                "selector_size": selector.size,
                "rows": bank.rows,
            }
        out = ffi.new("struct vmm_window **")
        check(lib.vmm_window_new(config, out), f"window of {size} bytes")
        super().__init__(ffi.gc(out[0], lib.vmm_window_free), token)

    def read(self, name: str, row: int = 0) -> int:
        """What is stored in a register (of a row)."""
        register = self.registers[name]
        return int.from_bytes(self.load(register.offset, register.size, row), "little")

    def write(self, name: str, value: int, row: int = 0) -> None:
        """Stores a register's value, whatever the guest may write."""
        register = self.registers[name]
        self.store(register.offset, value.to_bytes(register.size, "little"), row)

    def set_bits(self, name: str, bits: int) -> None:
        """Sets bits of a register (of row 0) that the guest may be clearing meanwhile."""
        register = self.registers[name]
        data = bits.to_bytes(register.size, "little")
        result = lib.vmm_window_set_bits(self.native, register.offset, data, len(data))
        check(result, "setting bits of a register")

    def load(self, offset: int, size: int, row: int = 0) -> bytes:
        """Stored bytes. Raises OSError (ERANGE) outside of the window or its rows."""
        data = ffi.new("uint8_t[]", size)
        check(lib.vmm_window_load(self.native, row, offset, data, size), "reading a window")
        return bytes(ffi.buffer(data))

    def store(self, offset: int, data: bytes, row: int = 0) -> None:
        """Stores bytes. Raises OSError (ERANGE) outside of the window or its rows."""
        check(lib.vmm_window_store(self.native, row, offset, data, len(data)), "storing registers")

    def row_of(self, offset: int) -> int:
        """How many rows exist of the byte at `offset`; 1 where it is not banked."""
        return next((rows for start, end, rows in self._rows if start <= offset < end), 1)

    def told_parts(self, told: Any) -> Iterator[Access]:
        wanted = Tell.WRITE | Tell.CHANGE if told.write else Tell.READ
        last = told.offset + told.size
        touched = dict.fromkeys(self._at.get(at) for at in range(told.offset, last))
        for register in touched:
            if register is None or not register.tell & wanted:
                continue
            start = max(told.offset, register.offset)
            size = min(last, register.offset + register.size) - start
            value = told.value >> 8 * (start - told.offset) & (1 << 8 * size) - 1
            yield Access(register.name, start, size, told.row, told.write, value)

    def save(self) -> dict[str, list[int]]:
        """All registers, a value a row."""
        return {
            name: [self.read(name, row) for row in range(self.row_of(register.offset))]
            for name, register in self.registers.items()
        }

    def restore(self, state: dict[str, list[int]]) -> None:
        """What `save` gave. Raises ValueError where it is not of such a window."""
        if not isinstance(state, dict) or state.keys() != self.registers.keys():
            raise ValueError("registers of another device")
        for name, values in state.items():
            rows = self.row_of(self.registers[name].offset)
            if not isinstance(values, list) or len(values) != rows:
                raise ValueError(f"register {name} of another device")
            for row, value in enumerate(values):
                try:
                    self.write(name, value, row)
                except (OverflowError, AttributeError, TypeError) as error:
                    raise ValueError(f"register {name}: {value!r}") from error

    def close(self) -> None:
        """Whatever still asks for it afterwards gets a TypeError."""
        native, self.native = self.native, None
        ffi.release(native)


class _Traceback:
    """Made into text only where it is logged."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __str__(self) -> str:
        return "".join(traceback.format_exception(self._error))


class Bus:
    """The guest's two address spaces, MMIO and PIO, and the windows in them."""

    def __init__(self) -> None:
        out = ffi.new("struct vmm_bus **")
        check(lib.vmm_bus_new(out), "bus")
        self.native = ffi.gc(out[0], lib.vmm_bus_free)
        self._windows: dict[int, NativeWindow] = {}
        self._warnings = RateLimitedLog(_log)

    def place(self, window: NativeWindow, space: int, base: int) -> None:
        """Has `window` answer at `base`. Raises OSError: EEXIST where something else is there."""
        check(lib.vmm_bus_place(self.native, window.native, space, base), f"window at {base:#x}")
        self._windows[window.token] = window

    def remove(self, window: NativeWindow) -> None:
        """Nothing answers there any more; a window that is on no bus is left alone."""
        if self._windows.pop(window.token, None) is not None:
            lib.vmm_bus_remove(self.native, window.native)

    def holds(self, window: NativeWindow) -> bool:
        return window.token in self._windows

    async def answer(self, told: Any) -> int:
        """Carries out a told access (struct vmm_access); what a read finds, or 0.

        A handler that fails costs its guest this access: a read finds 0 there, and the log tells.
        """
        window = self._windows.get(told.token)
        if window is None or window.handler is None:
            return 0
        value = 0 if told.write else int(told.value)
        for access in window.told_parts(told):
            # The part before may have taken the device away.
            if not self.holds(window):
                break
            found = await self._handle(window.handler, access)
            if not access.write:
                shift, mask = 8 * (access.offset - told.offset), (1 << 8 * access.size) - 1
                value = value & ~(mask << shift) | (found & mask) << shift
        return value

    async def _handle(self, handler: Handler, access: Access) -> int:
        try:
            return await handler(access) or 0
        except Exception as error:
            self._warnings.warning("%s: a fault of vdev's own:\n%s", access, _Traceback(error))
            return 0

    async def access(self, space: int, address: int, size: int, value: int | None = None) -> int:
        """An access as the guest makes it: a write of `value`, or a read, which is returned."""
        write = value is not None
        data = ffi.new("uint8_t[]", (value or 0).to_bytes(size, "little"))
        told = ffi.new("struct vmm_access *")
        outcome = lib.vmm_bus_access(self.native, space, address, data, size, write, told)
        check(outcome, f"access of {size} bytes at {address:#x}")
        if outcome:
            return await self.answer(told)
        return int.from_bytes(bytes(ffi.buffer(data)), "little")

    def close(self) -> None:
        for window in tuple(self._windows.values()):
            self.remove(window)
        ffi.release(self.native)


def check(result: int, what: str) -> None:
    """Raises OSError for a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
