"""The memory map that a guest is told of (E820)."""

from __future__ import annotations

from typing import NamedTuple

from vdev.vmm.layout import (
    ACPI_BASE,
    ACPI_SIZE,
    ECAM_BASE,
    ECAM_SIZE,
    KERNEL_BASE,
    ram_ranges,
)

RAM, RESERVED, ACPI = 1, 2, 3
BASE_RAM_END = 0x9FC00
"""What a PC leaves below 640 KiB: the last KiB is the firmware's."""


class MapEntry(NamedTuple):
    """`size` bytes at `base` are of `kind` (ACPI specification, 15: Address Range Types)."""

    base: int
    size: int
    kind: int


def memory_map(memory_size: int) -> tuple[MapEntry, ...]:
    """The map of a machine with `memory_size` bytes of RAM, in ascending order.

    Raises UserError where that is no RAM size.
    """
    low, *high = ram_ranges(memory_size)
    return (
        MapEntry(0, BASE_RAM_END, RAM),
        MapEntry(ACPI_BASE, ACPI_SIZE, ACPI),
        MapEntry(KERNEL_BASE, low.size - KERNEL_BASE, RAM),
        # Linux uses the ECAM of the MCFG table only where firmware reserved it.
        MapEntry(ECAM_BASE, ECAM_SIZE, RESERVED),
        *(MapEntry(part.base, part.size, RAM) for part in high),
    )
