"""Kernels made for the tests, field by field, and guest memory that watches its loader."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdev.vmm.layout import ACPI_BASE, KERNEL_BASE, ram_ranges

MIB = 1 << 20

# Offset and format in the file (Linux, Documentation/arch/x86/boot.rst), and a sound value.
SETUP_FIELDS: dict[str, tuple[int, str, int]] = {
    "setup_sects": (0x1F1, "<B", 1),
    "root_flags": (0x1F2, "<H", 1),
    "syssize": (0x1F4, "<I", 0),
    "vid_mode": (0x1FA, "<H", 0),
    "boot_flag": (0x1FE, "<H", 0xAA55),
    "jump": (0x200, "<H", 0x6AEB),
    "header": (0x202, "<I", 0x53726448),
    "version": (0x206, "<H", 0x020F),
    "type_of_loader": (0x210, "<B", 0),
    "loadflags": (0x211, "<B", 1),
    "code32_start": (0x214, "<I", 0x100000),
    "initrd_addr_max": (0x22C, "<I", 0x7FFFFFFF),
    "kernel_alignment": (0x230, "<I", 0x200000),
    "relocatable_kernel": (0x234, "<B", 1),
    "min_alignment": (0x235, "<B", 21),
    "xloadflags": (0x236, "<H", 0x7F),
    "cmdline_size": (0x238, "<I", 2047),
    "setup_data": (0x250, "<Q", 0),
    "pref_address": (0x258, "<Q", 0x1000000),
    "init_size": (0x260, "<I", 4 * MIB),
    "handover_offset": (0x264, "<I", 0x190),
    "kernel_info_offset": (0x268, "<I", 0x300),
}
CODE = bytes(range(256)) * 32


def bzimage(**fields: int) -> bytes:
    """A bzImage around CODE; `fields` replace sound values."""
    fields = {"syssize": len(CODE) // 16} | fields
    sectors = fields.get("setup_sects", 1) or 4
    image = bytearray(512 * (sectors + 1))
    # The kernel's own sentinel (zero-page.rst), which no loader may copy.
    image[0x1EF] = 0xFF
    for name, (offset, form, value) in SETUP_FIELDS.items():
        struct.pack_into(form, image, offset, fields.pop(name, value))
    assert not fields
    return bytes(image) + CODE


def program_header(
    kind: int, offset: int, address: int, file_size: int, size: int, alignment: int = 0x1000
) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 7, offset, 0, address, file_size, size, alignment)


def note(owner: bytes, kind: int, value: bytes, alignment: int = 4) -> bytes:
    head = struct.pack("<III", len(owner), len(value), kind) + owner
    head += bytes(-len(head) % alignment)
    return head + value + bytes(-len(value) % alignment)


def pvh_note(entry: int) -> bytes:
    return note(b"Xen\0", 18, struct.pack("<Q", entry))


def elf_header(count: int, *, kind: int = 2, machine: int = 62, offset: int = 64) -> bytes:
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    return identity + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0x1000000, offset, 0, 0, 64, 56, count, 0, 0, 0
    )


def elf(
    segments: list[tuple[int, bytes, int]],
    notes: bytes | None = None,
    *,
    note_alignment: int = 4,
    kind: int = 2,
    machine: int = 62,
) -> bytes:
    """An ELF kernel of (address, content, size in memory); its entry is the first's start."""
    if notes is None:
        notes = note(b"GNU\0", 3, b"build id") + pvh_note(segments[0][0])
    headers, blob, position = b"", b"", 0x1000
    for address, content, size in segments:
        headers += program_header(1, position, address, len(content), size)
        blob += content
        position += len(content)
    headers += program_header(4, position, 0, len(notes), len(notes), note_alignment)
    head = elf_header(len(segments) + 1, kind=kind, machine=machine) + headers
    return head.ljust(0x1000, b"\0") + blob + notes


class WatchedRam:
    """RAM of a machine; knows what was written, and refuses what no loader may do."""

    def __init__(self, size: int, filled: bytes = b"\0") -> None:
        self.low = ram_ranges(size)[0].size
        self.memory = mmap.mmap(-1, self.low, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.written: list[tuple[int, int]] = []
        if filled != b"\0":
            self.memory[:] = filled * self.low

    def write(self, guest_addr: int, data: bytes | memoryview) -> None:
        self.view(guest_addr, len(data))[:] = data

    def fill(self, guest_addr: int, size: int, file: int, offset: int) -> int:
        assert guest_addr + size <= self.low
        room = memoryview(self.memory)[guest_addr : guest_addr + size]
        if filled := os.preadv(file, [room], offset):
            self.view(guest_addr, filled)
        return filled

    def view(self, guest_addr: int, size: int) -> memoryview:
        end = guest_addr + size
        assert size > 0
        assert 0x7000 <= guest_addr < end <= self.low, f"{guest_addr:#x}-{end:#x} is no RAM"
        assert end <= ACPI_BASE or guest_addr >= KERNEL_BASE, "over the ACPI tables"
        for start, stop in self.written:
            assert end <= start or guest_addr >= stop, f"{guest_addr:#x} is written twice"
        self.written.append((guest_addr, end))
        return memoryview(self.memory)[guest_addr:end]

    def read(self, address: int, size: int) -> bytes:
        return self.memory[address : address + size]

    def unpack(self, form: str, address: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self.memory, address)

    def text(self, address: int) -> bytes:
        return self.memory[address : self.memory.find(b"\0", address)]


@contextmanager
def memory_file(content: bytes) -> Iterator[Path]:
    """A file that exists only as long as its descriptor, for tests that make thousands."""
    fd = os.memfd_create("kernel")
    try:
        os.write(fd, content)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
