"""The serial port: an 8250 in C, its bytes from and to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable

from vdev._native import ffi, lib
from vdev.registers import PIO, Bus, NativeWindow, check
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import SERIAL_GSI, SERIAL_PORT

_READ = 1 << 16
_PIPE = 1 << 20
"""Bytes of output that wait for the event loop; beyond that they are dropped and counted."""


class Serial:
    """COM1. `output(data)` gets what the guest writes; close it with `close`."""

    def __init__(self, bus: Bus, interrupts: Interrupts, output: Callable[[bytes], None]) -> None:
        self._bus = bus
        self._output = output
        self._line = interrupts.pin(SERIAL_GSI)
        self._from_guest, to_host = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _grow(to_host)
        self._room = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        out = ffi.new("struct vmm_serial **")
        check(lib.vmm_serial_new(to_host, self._line.fd, self._room, out), "serial port")
        os.close(to_host)
        self._native = out[0]
        self._window = NativeWindow(lib.vmm_serial_window(self._native))
        bus.place(self._window, PIO, SERIAL_PORT)
        self._loop = asyncio.get_running_loop()
        self._has_room = asyncio.Event()
        self._writing = asyncio.Lock()
        self._loop.add_reader(self._from_guest, self._read)
        self._loop.add_reader(self._room, self._on_room)

    async def write(self, data: bytes) -> None:
        """Gives bytes to the guest; returns when all are in its FIFO."""
        async with self._writing:
            while data:
                self._has_room.clear()
                taken = lib.vmm_serial_receive(self._native, data, len(data))
                data = data[taken:]
                if data:
                    await self._has_room.wait()

    def stats(self) -> dict[str, int]:
        """Bytes sent by the guest, of these dropped, and received by it."""
        out = ffi.new("struct vmm_serial_stats *")
        lib.vmm_serial_read_stats(self._native, out)
        return {"sent": out.sent, "dropped": out.dropped, "received": out.received}

    def reset(self) -> None:
        """As at power-on."""
        lib.vmm_serial_reset(self._native)
        self._has_room.set()

    def save(self) -> bytes:
        """Registers and FIFO."""
        state = ffi.new("struct vmm_serial_state *")
        lib.vmm_serial_save(self._native, state)
        return bytes(ffi.buffer(state))

    def restore(self, state: bytes) -> None:
        """Raises ValueError where it is no such state."""
        native = ffi.new("struct vmm_serial_state *")
        if len(state) != ffi.sizeof("struct vmm_serial_state"):
            raise ValueError("state of another serial port")
        ffi.buffer(native)[:] = state
        if lib.vmm_serial_load(self._native, native) < 0:
            raise ValueError("a serial port cannot be in such a state")

    def flush(self) -> None:
        """Hands over what the guest has written until now."""
        self._read()

    def close(self) -> None:
        self._loop.remove_reader(self._from_guest)
        self._loop.remove_reader(self._room)
        self._bus.remove(self._window)
        lib.vmm_serial_free(self._native)
        os.close(self._from_guest)
        os.close(self._room)

    def _read(self) -> None:
        try:
            while data := os.read(self._from_guest, _READ):
                self._output(data)
                if len(data) < _READ:
                    return
        except BlockingIOError:
            pass

    def _on_room(self) -> None:
        os.eventfd_read(self._room)
        self._has_room.set()


def _grow(pipe: int) -> None:
    # /proc/sys/fs/pipe-max-size may be below; then the pipe is as it was.
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
