"""ELF kernels with a PVH note: what the guest finds, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.vmm.boot_images import (
    MIB,
    WatchedRam,
    elf,
    elf_header,
    note,
    program_header,
    pvh_note,
)
from tests.vmm.test_boot_bzimage import loaded, refused
from vdev.errors import UserError
from vdev.vmm.boot import open_kernel

GIB = 1 << 30
TEXT, DATA = b"text" * 1000, b"data" * 500
KERNEL = [(0x1000000, TEXT, 0x2000), (0x1200000, DATA, 0x100000)]


def test_start_info_has_all_that_the_kernel_reads(tmp_path: Path) -> None:
    initrd = b"ramdisk!" * 1000
    ram, state = loaded(tmp_path, elf(KERNEL), initrd=initrd, cmdline="console=ttyS0", rsdp=0xF0000)
    assert state.mode == "protected32"
    assert state.rip == 0x1000000
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = ram.unpack(
        "<IIIIQQQQII", state.rbx
    )
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert rsdp == 0xF0000
    assert ram.text(cmdline) == b"console=ttyS0"
    assert modules == 1
    address, size, module_cmdline, module_reserved = ram.unpack("<4Q", modlist)
    assert (size, module_cmdline, module_reserved) == (len(initrd), 0, 0)
    assert address == 64 * MIB - 8192
    assert ram.read(address, size) == initrd
    assert [ram.unpack("<QQII", memmap + 24 * index) for index in range(entries)] == [
        (0, 0x9FC00, 1, 0),
        (0xF0000, 0xF000, 3, 0),
        (0x100000, 63 * MIB, 1, 0),
        (0xE0000000, 0x100000, 2, 0),
    ]


def test_without_an_initrd_there_is_no_module(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, elf(KERNEL))
    assert ram.unpack("<IQ", state.rbx + 12) == (0, 0)


def test_an_initrd_for_elf_reaches_the_end_of_low_ram(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, elf(KERNEL), memory=8 * GIB, initrd=b"x")
    (modlist,) = ram.unpack("<Q", state.rbx + 16)
    assert ram.unpack("<Q", modlist) == (3 * GIB - 4096,)
    (memmap, entries) = ram.unpack("<QI", state.rbx + 40)
    assert ram.unpack("<QQII", memmap + 24 * (entries - 1)) == (4 * GIB, 5 * GIB, 1, 0)


def test_segments_are_loaded_and_the_rest_of_them_cleared(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(elf(KERNEL))
    kernel = open_kernel(tmp_path / "kernel")
    ram = WatchedRam(32 * MIB, filled=b"\xee")
    kernel.load(ram, memory_size=32 * MIB)
    kernel.close()
    for address, content, size in KERNEL:
        assert ram.read(address, size) == content.ljust(size, b"\0")
        assert ram.read(address - 1, 1) == b"\xee"
        assert ram.read(address + size, 1) == b"\xee"


def test_the_32_bit_entry_state(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, elf(KERNEL))
    assert ram.unpack("<6Q", state.gdt_base) == state.gdt
    assert state.gdt[2:5] == (0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067)
    assert (state.code.l, state.code.db, state.code.limit) == (0, 1, 0xFFFFFFFF)
    assert (state.tss.base, state.tss.limit, state.tss.type) == (0, 0x67, 11)
    # pvh.pandoc: all writable bits of cr0 but PE, and all of cr4, are clear; ET is hard-wired.
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x11, 0, 0, 0)


@pytest.mark.parametrize("alignment", [0, 1, 4, 8])
@pytest.mark.parametrize("form", ["<I", "<Q"])
def test_the_note_is_found_in_any_form(tmp_path: Path, alignment: int, form: str) -> None:
    pad = 8 if alignment == 8 else 4
    notes = note(b"GNU\0", 18, b"1234", pad)
    notes += note(b"Linux\0", 18, b"12345", pad) + note(b"Xen\0", 6, b"linux\0", pad)
    notes += note(b"Xen\0", 18, struct.pack(form, 0x1000010), pad)
    _, state = loaded(tmp_path, elf(KERNEL, notes, note_alignment=alignment))
    assert state.rip == 0x1000010


def test_segments_may_touch_and_come_in_any_order(tmp_path: Path) -> None:
    parts = [(0x1002000, DATA, 0x1000), (0x1000000, TEXT, 0x2000), (0x1003000, b"", 0)]
    ram, state = loaded(tmp_path, elf(parts))
    assert state.rip == 0x1002000
    assert ram.read(0x1000000, len(TEXT)) == TEXT
    assert ram.read(0x1002000, len(DATA)) == DATA


def test_memory_must_reach_to_the_last_segment(tmp_path: Path) -> None:
    parts = [(0x1000000, TEXT, 0x2000), (64 * MIB - 0x1000, DATA, 0x1000)]
    loaded(tmp_path, elf(parts))
    with pytest.raises(UserError, match="needs RAM up to 64 MiB: memory of 62 MiB"):
        loaded(tmp_path, elf(parts), memory=62 * MIB)
    with pytest.raises(UserError, match="do not fit"):
        loaded(tmp_path, elf(parts), initrd=b"x")


def test_linux_s_limit_holds_for_the_command_line(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, elf(KERNEL), cmdline="x" * 2047)
    (cmdline,) = ram.unpack("<Q", state.rbx + 24)
    assert ram.text(cmdline) == b"x" * 2047
    with pytest.raises(UserError, match="2047 at most"):
        loaded(tmp_path, elf(KERNEL), cmdline="x" * 2048)


def changed(position: int, value: bytes, image: bytes | None = None) -> bytes:
    image = elf(KERNEL) if image is None else image
    return image[:position] + value + image[position + len(value) :]


FIRST = 64
"""Where the first program header is."""


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (changed(4, b"\x01"), "a 32-bit ELF file"),
        (changed(4, b"\x07"), "another byte order"),
        (changed(5, b"\x02"), "another byte order"),
        (elf(KERNEL, machine=183), "for machine 183"),
        (elf(KERNEL, kind=1), "perhaps a kernel module"),
        (elf(KERNEL, kind=4), "a core dump"),
        (elf(KERNEL, kind=77), "of type 77"),
        (elf(KERNEL, b""), "without a PVH entry note"),
        (elf(KERNEL, note(b"Xen\0", 18, b"123")), "without a PVH entry note"),
        (elf(KERNEL, note(b"Xen\0", 17, b"1234")), "without a PVH entry note"),
        (elf(KERNEL, struct.pack("<III", 4, 1 << 31, 18) + b"Xen\0"), "without a PVH entry"),
        (elf(KERNEL, struct.pack("<III", (1 << 32) - 4, 4, 18)), "without a PVH entry"),
        (elf(KERNEL, bytes(65537)), "65537 bytes of notes"),
        (elf(KERNEL, pvh_note(0xFFFFFF)), "entry 0xffffff is in none"),
        (elf(KERNEL, pvh_note(0)), "entry 0x0 is in none"),
        (elf(KERNEL, pvh_note(0x1001FFF)), "entry 0x1001fff is in none"),
        (elf(KERNEL, note(b"Xen\0", 18, b"\xff" * 8)), "is in none"),
        (elf([(0xFF000, TEXT, 0x2000)]), "a segment at 0xff000 to 0x101000"),
        (elf([(0, TEXT, 0x2000)]), "a segment at 0x0"),
        (elf([(0xBFFFF000, TEXT, 0x1001)]), "a segment at 0xbffff000"),
        (elf([(0x100000000, TEXT, 0x2000)]), "a segment at 0x100000000"),
        (elf([((1 << 64) - 4096, TEXT, 0x2000)]), "a segment at 0xfffffffffffff000"),
        (elf([(0x1000000, TEXT, (1 << 64) - 1)]), "a segment at 0x1000000"),
        (elf([(0x1000000, TEXT, 3999)]), "4000 bytes in the file but 3999 in memory"),
        (elf([(0x1000000, TEXT, 0x2000), (0x1001FFF, DATA, 0x1000)]), "overlap"),
        (elf([(0x1000000, TEXT, 0x8000), (0x1001000, DATA, 0x1000)]), "overlap"),
        (elf([(0x1000000, TEXT, 0x2000), (0x1000000, TEXT, 0x2000)]), "overlap"),
        (elf([(0x1000000, b"", 0)]), "no segment to load"),
        (changed(FIRST + 8, b"\xff" * 8), "truncated: its segments end at"),
        (changed(FIRST + 8, struct.pack("<Q", 1 << 63)), "truncated: its segments end at"),
        (changed(32, b"\xff" * 8), "truncated: its program headers end at"),
        (changed(54, struct.pack("<H", 55)), "3 program headers of 55 bytes"),
        (changed(56, struct.pack("<H", 0)), "0 program headers"),
        (changed(56, struct.pack("<H", 0xFFFF)), "65535 program headers"),
        (changed(FIRST + 2 * 56 + 32, struct.pack("<Q", 1 << 40)), "truncated: its notes end at"),
        (elf_header(1)[:63], "truncated after 63 bytes"),
        (b"\x7fELF", "truncated after 4 bytes"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, image: bytes, message: str) -> None:
    assert message in refused(tmp_path, image)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = elf(KERNEL)
    for size in (*range(1, 256), 0xFFF, 0x1000, 0x1001, len(whole) - 64, len(whole) - 1):
        refused(tmp_path, whole[:size])


def test_program_headers_may_lie_far_behind(tmp_path: Path) -> None:
    image = elf(KERNEL)
    headers = image[64 : 64 + 3 * 56]
    moved = changed(32, struct.pack("<Q", len(image)), image) + headers
    _, state = loaded(tmp_path, moved)
    assert state.rip == 0x1000000


def test_many_notes_do_not_take_long(tmp_path: Path) -> None:
    """256 headers that name the same notes: their sum has a limit, not each of them."""
    headers = program_header(1, 0, 0x1000000, 64, 64)
    headers += program_header(4, 0x4000, 0, 60000, 60000) * 255
    image = (elf_header(256) + headers).ljust(0x4000, b"\0") + bytes(60000)
    assert "120000 bytes of notes: 65536 at most" in refused(tmp_path, image)
