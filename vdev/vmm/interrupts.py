"""Interrupts: GSIs, the messages behind them, and the eventfds that raise them.

An eventfd raises its GSI while it is connected. One that is signalled while it is not keeps its
count, and KVM raises the interrupt when it is connected again: a masked vector's pending bit.
"""

from __future__ import annotations

import os

from vdev.vmm.layout import MSI_FIRST_GSI
from vdev.vmm.vm import VM, Route


class Line:
    """An eventfd that raises a GSI while `connected`."""

    def __init__(self, gsi: int, fd: int | None = None) -> None:
        """fd: an eventfd that stays the caller's; without one the line has its own."""
        self.gsi = gsi
        self._owned = fd is None
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if fd is None else fd
        self.connected = False

    def close(self) -> None:
        if self._owned:
            os.close(self.fd)


class Interrupts:
    """All lines of a machine, over whatever `VM` it has at present."""

    def __init__(self) -> None:
        self._vm: VM | None = None
        self._lines: list[Line] = []
        self._routes: dict[int, Route] = {}
        self._free: list[int] = []
        self._next = MSI_FIRST_GSI

    def attach(self, vm: VM) -> None:
        """Everything that is connected is so on `vm`."""
        self._vm = vm
        self._set_routes()
        for line in self._lines:
            if line.connected:
                vm.irqfd(line.fd, line.gsi, True)

    def detach(self) -> None:
        """The present VM is going."""
        self._vm = None

    def pin(self, gsi: int, fd: int | None = None) -> Line:
        """A pin of the I/O APIC, connected."""
        line = Line(gsi, fd)
        self._lines.append(line)
        self.connect(line, True)
        return line

    def message(self) -> Line:
        """A GSI for a message-signalled interrupt, not connected yet."""
        gsi = self._free.pop() if self._free else self._next
        if gsi == self._next:
            self._next += 1
        line = Line(gsi)
        self._lines.append(line)
        return line

    def release(self, line: Line) -> None:
        """Gives a line up."""
        self.connect(line, False)
        self._lines.remove(line)
        if line.gsi >= MSI_FIRST_GSI:
            self._routes.pop(line.gsi, None)
            self._free.append(line.gsi)
        line.close()

    def route(self, line: Line, address: int, data: int) -> None:
        """What the line sends from now on.

        Raises OSError where KVM knows no such address; the line sends what it sent before.
        """
        before, route = self._routes.get(line.gsi), Route(line.gsi, address, data)
        if before == route:
            return
        self._routes[line.gsi] = route
        try:
            self._set_routes()
        except OSError:
            if before is None:
                del self._routes[line.gsi]
            else:
                self._routes[line.gsi] = before
            raise

    def connect(self, line: Line, connected: bool) -> None:
        if line.connected == connected:
            return
        if self._vm is not None:
            self._vm.irqfd(line.fd, line.gsi, connected)
        line.connected = connected

    def close(self) -> None:
        """Gives up the lines that nobody released."""
        for line in tuple(self._lines):
            self.release(line)

    def _set_routes(self) -> None:
        if self._vm is not None:
            self._vm.set_routes(list(self._routes.values()))
