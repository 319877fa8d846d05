"""Where things lie in a machine's two address spaces: the guest's physical memory, and I/O ports.

```
0x0000_0000  RAM                       0x0600       ACPI sleep control, sleep status, reset
0x0000_7000  boot data (boot/entry.py)       0x0505       pvpanic
0x000f_0000  ACPI tables               0x03f8       8250 (GSI 4)
0x000f_e000  generation id
0x000f_fff0  reset vector (power.py)
0x0010_0000  kernel                    0x0610       hot-plug registers (GSI 5)
0xc000_0000  end of low RAM at most
0xd000_0000  MMIO: virtio-mmio slots, then BARs of PCI functions
0xe000_0000  ECAM, 1 MiB a bus: bus 0
0xfec0_0000  I/O APIC
0xfee0_0000  local APICs
0xfffb_c000  what KVM on Intel needs for itself
0x1_0000_0000  RAM above the hole
```
"""

from __future__ import annotations

from typing import NamedTuple

from vdev.errors import UserError

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30

BOOT_DATA = 0x7000
ACPI_BASE = 0xF0000
ACPI_SIZE = 0xF000
VMGENID = 0xFE000
RESET_VECTOR = 0xFFFF0
KERNEL_BASE = 0x100000

LOW_RAM_MAX = 0xC0000000
HIGH_RAM_BASE = 0x100000000

MMIO_BASE = 0xD0000000
VIRTIO_MMIO_SIZE = 0x1000
MMIO_SLOTS = 32
BAR_BASE = 0xD0100000
BAR_END = 0xE0000000
ECAM_BASE = 0xE0000000
ECAM_SIZE = 0x100000
IOAPIC_BASE = 0xFEC00000
LAPIC_BASE = 0xFEE00000
KVM_IDENTITY_MAP = 0xFFFBC000
KVM_TSS = 0xFFFBD000

SERIAL_PORT = 0x3F8
SERIAL_GSI = 4
POWER_PORT = 0x600
POWER_SLEEP_CONTROL, POWER_SLEEP_STATUS, POWER_RESET, POWER_SIZE = 0, 1, 2, 4
RESET_VALUE = 1
HOTPLUG_PORT = 0x610
HOTPLUG_SIZE = 16
GED_GSI = 5
PVPANIC_PORT = 0x505
MMIO_FIRST_GSI = 8
"""virtio-mmio slots have GSIs of their own, from here."""
IOAPIC_PINS = 24
MSI_FIRST_GSI = IOAPIC_PINS

MEMORY_MIN = 32 * MIB
CPUS_MAX = 64


class RamRange(NamedTuple):
    """`size` bytes of RAM at `base`, which lie at `offset` of the machine's memory file."""

    base: int
    size: int
    offset: int


def ram_ranges(size: int) -> tuple[RamRange, ...]:
    """How `size` bytes of RAM lie around the hole. Raises UserError where that is no RAM size."""
    if size < MEMORY_MIN or size % (2 * MIB):
        raise UserError(
            f"memory of {size} bytes: at least {MEMORY_MIN // MIB} MiB, a multiple of 2 MiB"
        )
    if size <= LOW_RAM_MAX:
        return (RamRange(0, size, 0),)
    return (
        RamRange(0, LOW_RAM_MAX, 0),
        RamRange(HIGH_RAM_BASE, size - LOW_RAM_MAX, LOW_RAM_MAX),
    )
