"""The ACPI tables of a machine (ACPI 6.3, chapter 5), as one image for guest memory.

The machine is of the hardware-reduced kind: no power management timer, no SCI, no 8259 and no
fixed events. Sleep and reset are registers of one byte each in I/O space.
"""

from __future__ import annotations

import struct

from vdev.errors import UserError
from vdev.vmm import layout
from vdev.vmm.acpi import aml, dsdt
from vdev.vmm.acpi.platform import MmioDevice, Platform

__all__ = ["MmioDevice", "Platform", "build"]

_OEM = b"VDEV  "
_OEM_TABLE = b"VDEVVMM "
_CREATOR = b"VDEV"
_REVISION = 1
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_ALIGN = 64

_FADT_SIZE = 276
_FADT_REVISION, _FADT_MINOR = 6, 3
# No VGA, no ASPM by the guest, no CMOS clock; and neither legacy devices nor an 8042. MSI is fine.
_BOOT_FLAGS = 1 << 2 | 1 << 4 | 1 << 5
# WBINVD works, C1 exists, buttons are devices, RESET_REG_SUP, HW_REDUCED_ACPI.
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20

_CPU_ENABLED = 1
_XAPIC_IDS = 255
"""Ids and UIDs from here on need entries of the x2APIC kind: 255 stands for all processors."""
_IOAPIC_ID = 0


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    header = _HEADER.pack(
        signature, size, revision, 0, _OEM, _OEM_TABLE, _REVISION, _CREATOR, _REVISION
    )
    data = bytearray(header + body)
    data[9] = _checksum(data)
    return bytes(data)


def _io_register(offset: int) -> bytes:
    """A generic address structure: one byte of I/O space."""
    return struct.pack("<BBBBQ", aml.Space.IO, 8, 0, 1, layout.POWER_PORT + offset)


def _fadt(dsdt_address: int) -> bytes:
    data = bytearray(_FADT_SIZE)
    struct.pack_into("<I", data, 40, dsdt_address)
    struct.pack_into("<H", data, 109, _BOOT_FLAGS)
    struct.pack_into("<I", data, 112, _FADT_FLAGS)
    data[116:128] = _io_register(layout.POWER_RESET)
    data[128] = layout.RESET_VALUE
    data[131] = _FADT_MINOR
    struct.pack_into("<Q", data, 140, dsdt_address)
    data[244:256] = _io_register(layout.POWER_SLEEP_CONTROL)
    data[256:268] = _io_register(layout.POWER_SLEEP_STATUS)
    return _table(b"FACP", _FADT_REVISION, bytes(data[_HEADER.size :]))


def _madt(cpus: tuple[int, ...]) -> bytes:
    """No overrides: every GSI is the I/O APIC's pin of that number, edge-triggered, active-high."""
    body = struct.pack("<II", layout.LAPIC_BASE, 0)
    for uid, apic_id in enumerate(cpus):
        if apic_id < _XAPIC_IDS and uid < _XAPIC_IDS:
            body += struct.pack("<BBBBI", 0, 8, uid, apic_id, _CPU_ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, _CPU_ENABLED, uid)
    body += struct.pack("<BBBBII", 1, 12, _IOAPIC_ID, 0, layout.IOAPIC_BASE, 0)
    return _table(b"APIC", 5, body)


def _mcfg() -> bytes:
    last_bus = layout.ECAM_SIZE // layout.MIB - 1
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", layout.ECAM_BASE, 0, 0, last_bus))


def _rsdp(xsdt_address: int) -> bytes:
    data = bytearray(_RSDP.pack(b"RSD PTR ", 0, _OEM, 2, 0, _RSDP.size, xsdt_address, 0))
    data[8] = _checksum(data[:20])
    data[32] = _checksum(data)
    return bytes(data)


def build(platform: Platform) -> bytes:
    """All tables of a machine, for guest memory at `layout.ACPI_BASE`; the RSDP is at its start.

    Raises UserError where they need more than `layout.ACPI_SIZE`.
    """
    image = bytearray(_RSDP.size)

    def place(table: bytes) -> int:
        image.extend(bytes(-len(image) % _ALIGN))
        address = layout.ACPI_BASE + len(image)
        image.extend(table)
        return address

    fadt = _fadt(place(_table(b"DSDT", 2, dsdt.encode(platform))))
    tables = [place(fadt), place(_madt(platform.cpus))]
    if platform.pci:
        tables.append(place(_mcfg()))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    image[: _RSDP.size] = _rsdp(xsdt)
    if len(image) > layout.ACPI_SIZE:
        raise UserError(
            f"ACPI tables of {len(image)} bytes for {len(platform.cpus)} CPUs and "
            f"{len(platform.mmio_devices)} MMIO devices: at most {layout.ACPI_SIZE} fit"
        )
    return bytes(image)
