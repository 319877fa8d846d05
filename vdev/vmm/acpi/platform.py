"""What the tables describe."""

from __future__ import annotations

from typing import NamedTuple

from vdev.record import Record

PCI_SLOTS = 32


class MmioDevice(NamedTuple):
    """A virtio-mmio transport: `size` bytes of registers at `base`, an interrupt `gsi`."""

    base: int
    size: int
    gsi: int


class Platform(Record):
    """A machine, as far as its guest is told of it by ACPI.

    `cpus` are APIC ids, the boot processor's first. `hotplug_slots` are numbers of PCI devices on
    bus 0 that may come and go. `high_mmio` is the PCI window above RAM: base and end, the end
    excluded. `vmgenid_address` is where the 16 bytes of the generation ID lie.
    """

    cpus: tuple[int, ...]
    mmio_devices: tuple[MmioDevice, ...] = ()
    pci: bool = False
    hotplug_slots: range = range(0)
    vmgenid_address: int | None = None
    pvpanic: bool = False
    serial: bool = False
    high_mmio: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the parts contradict each other."""
        if not self.cpus or len(set(self.cpus)) != len(self.cpus):
            raise ValueError(f"APIC ids {self.cpus}: must be at least one, all different")
        if self.hotplug_slots and not self.pci:
            raise ValueError("slots for hot-plug without PCI")
        if any(not 0 <= slot < PCI_SLOTS for slot in self.hotplug_slots):
            raise ValueError(f"slots {self.hotplug_slots}: must be within 0..{PCI_SLOTS - 1}")
