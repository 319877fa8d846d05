"""The root bus: device numbers, their configuration spaces in the ECAM, addresses for BARs."""

from __future__ import annotations

from vdev.errors import UserError
from vdev.registers import MMIO, Bus, Register, Window
from vdev.vmm.layout import BAR_BASE, BAR_END, ECAM_BASE
from vdev.vmm.pci.function import CONFIG_SIZE, PciFunction

SLOTS = 32
_HOST_BRIDGE = (
    Register("vendor", 0x00, 2, 0x1B36),
    Register("device", 0x02, 2, 0x0008),
    Register("command", 0x04, 2),
    Register("class", 0x08, 4, 0x060000 << 8),
    Register("subsystem", 0x2C, 4, 0x11001AF4),
)


class PciBus:
    """Bus 0: a host bridge at device 0, functions at 1 to 31."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bridge = Window(CONFIG_SIZE, _HOST_BRIDGE)
        self.slots: dict[int, PciFunction] = {}
        bus.place(self._bridge, MMIO, ECAM_BASE)

    def free_slot(self) -> int:
        """Raises UserError where all are taken."""
        for slot in range(1, SLOTS):
            if slot not in self.slots:
                return slot
        raise UserError(f"the PCI bus has no slot free: {SLOTS - 1} devices at most")

    def add(self, function: PciFunction, slot: int) -> None:
        """Puts a function into a slot, and its BAR where nothing else is."""
        function.set_bar(self._room_for(function))
        self._bus.place(function.config, MMIO, ECAM_BASE + (slot << 15))
        self.slots[slot] = function

    def remove(self, slot: int) -> PciFunction:
        """Takes the function out; it is the caller's to close."""
        function = self.slots.pop(slot)
        self._bus.remove(function.config)
        return function

    def close(self) -> None:
        """The functions have been removed."""
        self._bus.remove(self._bridge)
        self._bridge.close()

    def _room_for(self, function: PciFunction) -> int:
        taken = sorted(
            (address, other.bar_size)
            for other in self.slots.values()
            for address in (other.home, other.config.read("bar0"))
            if BAR_BASE <= address < BAR_END
        )
        at = BAR_BASE
        for base, size in [*taken, (BAR_END, 0)]:
            at = -(-at // function.bar_size) * function.bar_size
            if at + function.bar_size <= base:
                return at
            at = max(at, base + size)
        raise UserError("the PCI bus has no addresses left")
