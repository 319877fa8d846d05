"""MSI-X (PCI 3.0, section 6.8.2): a table of messages, and the lines that they make of eventfds."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import struct
from typing import Any

from vdev.ratelog import RateLimitedLog
from vdev.registers import ALL, Access, Register, Tell, Window
from vdev.vmm.interrupts import Interrupts

CAPABILITY = 0x11
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
_ENTRY = 16
_MASKED = 1

_log = logging.getLogger("vdev.machine")


class Msix:
    """The vectors of a function. The table tells of a vector's mask; addresses and data may only
    change while it is masked (section 6.8.3.5), so they are read when it is unmasked."""

    def __init__(self, interrupts: Interrupts, count: int, name: str) -> None:
        """name: of the device, for warnings."""
        self._name = name
        self._warnings = RateLimitedLog(_log)
        self._interrupts = interrupts
        self.count = count
        self._control = 0
        self._lines = [interrupts.message() for _ in range(count)]
        registers = []
        for vector in range(count):
            at = _ENTRY * vector
            registers += [
                Register(f"address{vector}", at, 8, writable=ALL & ~3),
                Register(f"data{vector}", at + 8, 4, writable=ALL),
                Register(
                    f"control{vector}", at + 12, 4, _MASKED, writable=_MASKED, tell=Tell.CHANGE
                ),
            ]
        self.table = Window(_ENTRY * count, registers, handler=self._table_access)
        self.pending = Window(
            8 * (-(-count // 64)),
            [Register("pending", 0, 8 * (-(-count // 64)), tell=Tell.READ)],
            handler=self._pending_access,
        )

    def fd(self, vector: int) -> int:
        """The eventfd that raises this vector."""
        return self._lines[vector].fd

    def capability(self, table_offset: int, pending_offset: int) -> bytes:
        """For BAR 0, without its "next" byte's value."""
        return struct.pack("<BBHII", CAPABILITY, 0, self.count - 1, table_offset, pending_offset)

    def set_control(self, control: int) -> None:
        """The message control word changed: enabled, or masked as a whole."""
        self._control = control
        for vector in range(self.count):
            self._apply(vector)

    def reset(self) -> None:
        for vector in range(self.count):
            self.table.write(f"address{vector}", 0)
            self.table.write(f"data{vector}", 0)
            self.table.write(f"control{vector}", _MASKED)
        self.set_control(0)
        for line in self._lines:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(line.fd)

    def save(self) -> dict[str, Any]:
        """The table. Pending vectors are signalled again by the queues, which are looked at when
        they go on."""
        return self.table.save()

    def restore(self, state: dict[str, Any], control: int) -> None:
        self.table.restore(state)
        self.set_control(control)

    def close(self) -> None:
        for line in self._lines:
            self._interrupts.release(line)
        self.table.close()
        self.pending.close()

    def _apply(self, vector: int) -> None:
        line = self._lines[vector]
        enabled = self._control & (ENABLE | FUNCTION_MASK) == ENABLE
        live = enabled and not self.table.read(f"control{vector}") & _MASKED
        if live:
            address, data = self.table.read(f"address{vector}"), self.table.read(f"data{vector}")
            try:
                self._interrupts.route(line, address, data)
            except OSError:
                # No processor hears what is sent there: it stays pending.
                live = False
                self._warnings.warning(
                    "%s: MSI-X vector %d: KVM takes no message %#x to %#x: it stays pending",
                    *(self._name, vector, data, address),
                )
        self._interrupts.connect(line, live)

    async def _table_access(self, access: Access) -> int | None:
        for vector in range(
            access.offset // _ENTRY, (access.offset + access.size - 1) // _ENTRY + 1
        ):
            self._apply(vector)
        return None

    async def _pending_access(self, access: Access) -> int | None:
        poll = select.poll()
        vectors = {line.fd: vector for vector, line in enumerate(self._lines)}
        for line in self._lines:
            if not line.connected:
                poll.register(line.fd, select.POLLIN)
        bits = sum(1 << vectors[fd] for fd, _ in poll.poll(0))
        return bits >> 8 * access.offset & (1 << 8 * access.size) - 1
