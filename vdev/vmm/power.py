"""What ACPI's registers do: sleep, reset, and the event block behind the generic event device.

The event block is described in vdev/vmm/acpi/registers.py. Reset and sleep: ACPI 6.3, sections
4.8.3.6 and 4.8.3.7. A write of 0xfe to port 0x64 is how a PC's keyboard controller resets it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from vdev.registers import ALL, PIO, Access, Bus, Register, Tell, Window
from vdev.vmm.acpi.registers import SLEEP_S5, Event
from vdev.vmm.acpi.registers import Register as Block
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import (
    GED_GSI,
    HOTPLUG_PORT,
    HOTPLUG_SIZE,
    POWER_PORT,
    POWER_RESET,
    POWER_SIZE,
    POWER_SLEEP_CONTROL,
    POWER_SLEEP_STATUS,
    PVPANIC_PORT,
    RESET_VALUE,
)

_KEYBOARD_PORT, _KEYBOARD_RESET = 0x64, 0xFE
_SLEEP_BITS = 0x3C  # SLP_EN and SLP_TYP
_PANICKED, _CRASH_LOADED = 1, 2

_RESET_PORT = (POWER_PORT + POWER_RESET).to_bytes(2, "little")
# mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
RESET_CODE = bytes((0xBA, *_RESET_PORT, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD))
"""What stands at the real-mode reset vector, where a PC's firmware would reset the machine. Linux
jumps there on a hardware-reduced machine without EFI (its reboot type "bios")."""


class Power:
    """The registers, and who is to know: `shutdown`, `reset`, `panic` are called without arguments,
    `ejected(slot)` when the guest let go of one."""

    def __init__(
        self,
        bus: Bus,
        interrupts: Interrupts,
        *,
        shutdown: Callable[[], None],
        reset: Callable[[], None],
        panic: Callable[[], None],
        ejected: Callable[[int], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._shutdown, self._reset, self._panic = shutdown, reset, panic
        self._ejected = ejected
        self._line = interrupts.pin(GED_GSI)
        self.power = Window(
            POWER_SIZE,
            (
                Register("sleep_control", POWER_SLEEP_CONTROL, 1, tell=Tell.WRITE),
                Register(
                    "sleep_status", POWER_SLEEP_STATUS, 1, writable=0x80, tell=Tell.ONE_CLEARS
                ),
                Register("reset", POWER_RESET, 1, tell=Tell.WRITE),
            ),
            handler=self._power_access,
        )
        self.events = Window(
            HOTPLUG_SIZE,
            (
                Register("events", Block.EVENTS, 4, writable=ALL, tell=Tell.ONE_CLEARS),
                Register("inserted", Block.INSERTED, 4, writable=ALL, tell=Tell.ONE_CLEARS),
                Register("requested", Block.REQUESTED, 4, writable=ALL, tell=Tell.ONE_CLEARS),
                Register("eject", Block.EJECT, 4, tell=Tell.WRITE),
            ),
            handler=self._events_access,
        )
        self.panicked = Window(
            1,
            (Register("event", 0, 1, _PANICKED | _CRASH_LOADED, tell=Tell.WRITE),),
            handler=self._panic_access,
        )
        self.keyboard = Window(
            1, (Register("command", 0, 1, tell=Tell.WRITE),), handler=self._keyboard_access
        )
        bus.place(self.keyboard, PIO, _KEYBOARD_PORT)
        bus.place(self.power, PIO, POWER_PORT)
        bus.place(self.events, PIO, HOTPLUG_PORT)
        bus.place(self.panicked, PIO, PVPANIC_PORT)

    def raise_event(self, event: Event, slot: int | None = None) -> None:
        """Tells the guest of an event, of a slot if it concerns one."""
        if slot is not None:
            name = "inserted" if event is Event.SLOTS_INSERTED else "requested"
            self.events.set_bits(name, 1 << slot)
        self.events.set_bits("events", event)
        os.eventfd_write(self._line.fd, 1)

    def reset(self) -> None:
        """As at power-on."""
        for name in ("events", "inserted", "requested"):
            self.events.write(name, 0)

    def save(self) -> dict[str, list[int]]:
        return self.events.save()

    def restore(self, state: dict[str, list[int]]) -> None:
        self.events.restore(state)

    def close(self) -> None:
        for window in (self.power, self.events, self.panicked, self.keyboard):
            self._bus.remove(window)
            window.close()

    async def _power_access(self, access: Access) -> int | None:
        if access.register == "sleep_control" and access.value & _SLEEP_BITS == SLEEP_S5:
            self._shutdown()
        elif access.register == "reset" and access.value == RESET_VALUE:
            self._reset()
        return None

    async def _events_access(self, access: Access) -> int | None:
        if access.register == "eject":
            slots = access.value << 8 * (access.offset - Block.EJECT)
            for slot in range(32):
                if slots >> slot & 1:
                    await self._ejected(slot)
        return None

    async def _panic_access(self, access: Access) -> int | None:
        if access.value & _PANICKED:
            self._panic()
        return None

    async def _keyboard_access(self, access: Access) -> int | None:
        if access.value == _KEYBOARD_RESET:
            self._reset()
        return None
