"""Resource descriptors: the addresses, ports and interrupts of a device's _CRS (ACPI 6.3, 6.4)."""

from __future__ import annotations

import struct

from vdev.vmm.acpi import aml

# A checksum of zero stands for "not checked" (6.4.2.9).
_END_TAG = b"\x79\0"

_MEMORY, _BUS = 0, 2
_PRODUCER_FIXED = 0x0C
_READ_WRITE = 0x01


def template(*descriptors: bytes) -> bytes:
    """A _CRS: all of these."""
    return aml.buffer(b"".join(descriptors) + _END_TAG)


def _pack(layout: str, *values: int) -> bytes:
    try:
        return struct.pack(layout, *values)
    except struct.error as error:
        numbers = ", ".join(f"{value:#x}" for value in values)
        raise ValueError(f"a resource descriptor of {numbers}: {error}") from None


def io_port(base: int, size: int) -> bytes:
    """`size` ports from `base`, decoded in 16 bits."""
    return _pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def memory32_fixed(base: int, size: int) -> bytes:
    """`size` bytes of read-write memory below 4 GiB."""
    return _pack("<BHBII", 0x86, 9, _READ_WRITE, base, size)


def interrupt(gsi: int) -> bytes:
    """An edge-triggered, active-high interrupt of this device alone."""
    return _pack("<BHBBI", 0x89, 6, 0b00011, 1, gsi)


def _window(tag: int, letter: str, kind: int, flags: int, base: int, end: int) -> bytes:
    """A range that a bridge passes on: fixed at both ends, not translated."""
    if not base < end:
        raise ValueError(f"a window {base:#x}..{end:#x}: must not be empty")
    numbers = (0, base, end - 1, 0, end - base)
    size = 3 + struct.calcsize(f"<5{letter}")
    return _pack(f"<BHBBB5{letter}", tag, size, kind, _PRODUCER_FIXED, flags, *numbers)


def bus_window(first: int, end: int) -> bytes:
    """The bus numbers below a host bridge, `end` excluded."""
    return _window(0x88, "H", _BUS, 0, first, end)


def memory32_window(base: int, end: int) -> bytes:
    """Uncached memory behind a bridge, below 4 GiB, `end` excluded."""
    return _window(0x87, "I", _MEMORY, _READ_WRITE, base, end)


def memory64_window(base: int, end: int) -> bytes:
    """Uncached memory behind a bridge, anywhere, `end` excluded."""
    return _window(0x8A, "Q", _MEMORY, _READ_WRITE, base, end)
