"""A PCI function: its configuration space, its one BAR, its MSI-X, around a virtio device."""

from __future__ import annotations

import os
import struct
from typing import Any

from vdev.registers import MMIO, Access, Bus, Register, Tell, Window
from vdev.virtio.device import Device
from vdev.virtio.pci import PciTransport, bar_layout
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import BAR_BASE, BAR_END
from vdev.vmm.pci.msix import Msix
from vdev.vmm.vm import VM

CONFIG_SIZE = 256
MEMORY, BUS_MASTER, NO_INTX = 0x0002, 0x0004, 0x0400
_CAPABILITIES = 0x0010  # of the status register
_CAP_START = 0x40
_CFG_PCI_TYPE = 5


class PciFunction:
    """A virtio device as function 0 of a PCI device number."""

    def __init__(self, device: Device, interrupts: Interrupts, bus: Bus) -> None:
        self._bus = bus
        self._vm: VM | None = None
        self.device = device
        self.msix = Msix(interrupts, PciTransport.vectors_of(device), device.name)
        self.transport = PciTransport(device, self.msix)
        self._table, self._pending, self.bar_size = bar_layout(device.num_queues)
        self._windows = {
            **self.transport.windows,
            self._table: self.msix.table,
            self._pending: self.msix.pending,
        }
        self.home = 0
        self._decoded: int | None = None
        self.config = self._config_space()

    # The machine's side

    def set_bar(self, address: int) -> None:
        """Where firmware puts it, now and at each reset."""
        self.home = address
        self.config.write("bar0", address)

    def attach(self, vm: VM) -> None:
        """Notifications are heard on `vm`, now and wherever the BAR moves."""
        self._vm = vm
        if self._decoded is not None:
            self._notifications(self._decoded, True)

    def detach(self) -> None:
        """The present VM is going, and takes its notifications along."""
        self._vm = None

    async def reset(self) -> None:
        """As at power-on."""
        await self.transport.reset()
        self.msix.reset()
        for register in self.config.registers.values():
            if register.writable:
                self.config.write(register.name, register.initial)
        self.config.write("bar0", self.home)
        self._decode()

    def save(self) -> dict[str, Any]:
        """While the transport is suspended."""
        return {
            "config": self.config.save(),
            "msix": self.msix.save(),
            "transport": self.transport.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError where it is not the state of such a function."""
        try:
            self.config.restore(state["config"])
            self.transport.restore(state["transport"])
            self.msix.restore(state["msix"], self.config.read("msix_control"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.device.name}: state of something else") from error
        self._decode()

    async def close(self) -> None:
        self._undecode()
        await self.transport.close()
        self.msix.close()
        self.config.close()

    # Configuration space (PCI 3.0, section 6.1)

    def _config_space(self) -> Window:
        vendor, device_id, class_code = self.transport.ids
        registers = [
            Register("vendor", 0x00, 2, vendor),
            Register("device", 0x02, 2, device_id),
            Register("command", 0x04, 2, writable=MEMORY | BUS_MASTER | NO_INTX, tell=Tell.CHANGE),
            Register("status", 0x06, 2, _CAPABILITIES),
            Register("class", 0x08, 4, class_code << 8 | 1),
            Register("cache_line", 0x0C, 1, writable=0xFF),
            Register("bar0", 0x10, 4, writable=-self.bar_size, tell=Tell.CHANGE),
            Register("subsystem", 0x2C, 4, 0x40 + self.device.device_id << 16 | vendor),
            Register("capabilities", 0x34, 1, _CAP_START),
            Register("interrupt_line", 0x3C, 1, writable=0xFF),
            *self._capabilities(),
        ]
        return Window(CONFIG_SIZE, registers, handler=self._access)

    def _capabilities(self) -> list[Register]:
        """The linked list, each a run of registers; what can be written in it is told."""
        at, registers = _CAP_START, []
        chain = [
            self.msix.capability(self._table, self._pending),
            *self.transport.capabilities(),
        ]
        for number, capability in enumerate(chain):
            end = at + -(-len(capability) // 4) * 4
            following = end if number + 1 < len(chain) else 0
            body = bytes([capability[0], following]) + capability[2:]
            if number == 0:
                control = struct.unpack_from("<H", body, 2)[0]
                registers += [
                    Register("msix", at, 2, int.from_bytes(body[:2], "little")),
                    Register("msix_control", at + 2, 2, control, 0xC000, Tell.CHANGE),
                    Register("msix_tables", at + 4, 8, int.from_bytes(body[4:12], "little")),
                ]
            elif body[3] == _CFG_PCI_TYPE:
                registers += [
                    Register("window", at, 4, int.from_bytes(body[:4], "little")),
                    Register("window_bar", at + 4, 1, writable=0xFF),
                    Register("window_offset", at + 8, 4, writable=-1),
                    Register("window_length", at + 12, 4, writable=-1),
                    Register("window_data", at + 16, 4, tell=Tell.READ | Tell.WRITE),
                ]
            else:
                value = int.from_bytes(body, "little")
                registers.append(Register(f"capability{number}", at, len(body), value))
            at = end
        return registers

    async def _access(self, access: Access) -> int | None:
        if access.register == "window_data":
            return await self._window_data(access)
        if access.register == "msix_control":
            self.msix.set_control(self.config.read("msix_control"))
        else:
            self._decode()
        return None

    async def _window_data(self, access: Access) -> int | None:
        """Access to the BAR through the configuration space (virtio 1.3, section 4.1.4.9)."""
        offset, size = self.config.read("window_offset"), self.config.read("window_length")
        usable = size in (1, 2, 4) and not offset % size and offset + size <= self.bar_size
        if self._decoded is None or self.config.read("window_bar") or not usable:
            return 0xFFFFFFFF
        mask = (1 << 8 * size) - 1
        value = access.value & mask if access.write else None
        kick = self.transport.notifications.get(offset)
        if access.write and kick is not None:
            # No window is there: KVM hears the vCPU's own notifications.
            os.eventfd_write(kick, 1)
            return None
        return await self._bus.access(MMIO, self._decoded + offset, size, value) & mask

    def _decode(self) -> None:
        """Has the BAR answer where the registers say, or nowhere: the host bridge forwards to
        functions what lies between BAR_BASE and BAR_END alone."""
        at = self.config.read("bar0")
        reached = BAR_BASE <= at <= BAR_END - self.bar_size
        wanted = at if reached and self.config.read("command") & MEMORY else None
        if wanted == self._decoded:
            return
        self._undecode()
        if wanted is None:
            return
        try:
            for offset, window in self._windows.items():
                self._bus.place(window, MMIO, wanted + offset)
            self._notifications(wanted, True)
        except OSError:
            # Put where something else is: neither answers for this one.
            for window in self._windows.values():
                self._bus.remove(window)
            return
        self._decoded = wanted

    def _undecode(self) -> None:
        if self._decoded is None:
            return
        decoded, self._decoded = self._decoded, None
        for window in self._windows.values():
            self._bus.remove(window)
        self._notifications(decoded, False)

    def _notifications(self, base: int, assign: bool) -> None:
        if self._vm is None:
            return
        done: list[tuple[int, int]] = []
        try:
            for offset, kick in self.transport.notifications.items():
                self._vm.ioeventfd(kick, MMIO, base + offset, assign)
                done.append((kick, base + offset))
        except OSError:
            for kick, address in done:
                self._vm.ioeventfd(kick, MMIO, address, not assign)
            raise
