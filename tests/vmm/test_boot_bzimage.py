"""bzImage: what the guest finds, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.vmm.boot_images import CODE, MIB, SETUP_FIELDS, WatchedRam, bzimage
from vdev.errors import UserError
from vdev.vmm.boot import EntryState, open_initrd, open_kernel

GIB = 1 << 30


def loaded(
    tmp_path: Path,
    image: bytes,
    *,
    memory: int = 64 * MIB,
    initrd: bytes = b"",
    cmdline: str = "",
    rsdp: int = 0,
) -> tuple[WatchedRam, EntryState]:
    (tmp_path / "kernel").write_bytes(image)
    (tmp_path / "initrd").write_bytes(initrd)
    kernel = open_kernel(tmp_path / "kernel")
    ram = WatchedRam(memory)
    ramdisk = open_initrd(tmp_path / "initrd") if initrd else None
    try:
        state = kernel.load(ram, memory_size=memory, initrd=ramdisk, cmdline=cmdline, rsdp=rsdp)
    finally:
        kernel.close()
        if ramdisk:
            ramdisk.close()
    return ram, state


def refused(tmp_path: Path, image: bytes) -> str:
    (tmp_path / "kernel").write_bytes(image)
    with pytest.raises(UserError) as caught:
        open_kernel(tmp_path / "kernel")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def field(ram: WatchedRam, params: int, name: str) -> int:
    offset, form, _ = SETUP_FIELDS[name]
    (value,) = ram.unpack(form, params + offset)
    return value


def test_boot_params_have_all_that_the_kernel_reads(tmp_path: Path) -> None:
    initrd = b"ramdisk!" * 1000
    ram, state = loaded(
        tmp_path, bzimage(), initrd=initrd, cmdline="console=ttyS0 quiet", rsdp=0xF0000
    )
    params = state.rsi
    assert state.mode == "long64"
    assert ram.unpack("<Q", params + 0x070) == (0xF0000,)
    assert ram.read(params + 0x1EF, 1) == b"\0", "the sentinel was copied"
    assert field(ram, params, "header") == 0x53726448
    assert field(ram, params, "version") == 0x020F
    assert field(ram, params, "root_flags") == 1
    assert field(ram, params, "vid_mode") == 0xFFFF
    assert field(ram, params, "type_of_loader") == 0xFF
    assert field(ram, params, "loadflags") & 1
    assert field(ram, params, "code32_start") == 0x1000000
    assert field(ram, params, "kernel_info_offset") == 0x300
    (cmdline,) = ram.unpack("<I", params + 0x228)
    assert ram.text(cmdline) == b"console=ttyS0 quiet"
    image, size = ram.unpack("<II", params + 0x218)
    assert (image % 4096, size) == (0, len(initrd))
    assert ram.read(image, size) == initrd
    # Their upper halves, ext_ramdisk_image, ext_ramdisk_size and ext_cmd_line_ptr.
    assert ram.unpack("<3I", params + 0x0C0) == (0, 0, 0)


def test_code_lies_at_the_preferred_address_and_is_entered_at_0x200(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, bzimage(pref_address=0x1400000))
    assert state.rip == 0x1400200
    assert ram.read(0x1400000, len(CODE)) == CODE


@pytest.mark.parametrize(
    "fields", [{"relocatable_kernel": 0}, {"pref_address": 0}], ids=["fixed", "no preference"]
)
def test_a_kernel_without_a_choice_is_loaded_at_1_mib(
    tmp_path: Path, fields: dict[str, int]
) -> None:
    ram, state = loaded(tmp_path, bzimage(**fields))
    assert state.rip == 0x100200
    assert ram.read(0x100000, len(CODE)) == CODE


def test_what_follows_the_code_is_not_loaded(tmp_path: Path) -> None:
    ram, _ = loaded(tmp_path, bzimage() + b"signature")
    assert ram.read(0x1000000 + len(CODE), 9) == bytes(9)


def test_four_setup_sectors_are_meant_by_zero(tmp_path: Path) -> None:
    ram, _ = loaded(tmp_path, bzimage(setup_sects=0))
    assert ram.read(0x1000000, len(CODE)) == CODE


def test_pointers_of_the_file_reach_no_kernel(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, bzimage(setup_data=0xDEAD000))
    assert field(ram, state.rsi, "setup_data") == 0


@pytest.mark.parametrize("memory", [64 * MIB, 3 * GIB, 3 * GIB + 2 * MIB, 8 * GIB])
def test_the_memory_map_is_the_machine(tmp_path: Path, memory: int) -> None:
    ram, state = loaded(tmp_path, bzimage(), memory=memory)
    (count,) = ram.unpack("<B", state.rsi + 0x1E8)
    entries = [ram.unpack("<QQI", state.rsi + 0x2D0 + 20 * index) for index in range(count)]
    assert entries[:4] == [
        (0, 0x9FC00, 1),
        (0xF0000, 0xF000, 3),
        (0x100000, min(memory, 3 * GIB) - 0x100000, 1),
        (0xE0000000, 0x100000, 2),
    ]
    high = [(4 * GIB, memory - 3 * GIB, 1)] if memory > 3 * GIB else []
    assert entries[4:] == high
    assert entries == sorted(entries)


@pytest.mark.parametrize(
    ("limit", "memory", "end"),
    [
        (0x7FFFFFFF, 64 * MIB, 64 * MIB),
        (0x7FFFFFFF, 3 * GIB, 2 * GIB),
        (0x37FFFFFF, 8 * GIB, 0x38000000),
        (0xFFFFFFFF, 8 * GIB, 3 * GIB),
    ],
)
def test_the_initrd_lies_as_high_as_it_may(
    tmp_path: Path, limit: int, memory: int, end: int
) -> None:
    initrd = bytes(5000)
    ram, state = loaded(tmp_path, bzimage(initrd_addr_max=limit), memory=memory, initrd=initrd)
    assert ram.unpack("<I", state.rsi + 0x218) == (end - 8192,)


def test_an_initrd_may_touch_the_kernel_but_not_overlap_it(tmp_path: Path) -> None:
    room = 64 * MIB - (16 + 4) * MIB
    ram, state = loaded(tmp_path, bzimage(), initrd=bytes(room))
    assert ram.unpack("<II", state.rsi + 0x218) == (20 * MIB, room)
    with pytest.raises(UserError, match=r"initrd .*do not fit .* 20 MiB"):
        loaded(tmp_path, bzimage(), initrd=bytes(room + 1))


def test_memory_that_init_size_needs_must_be_there(tmp_path: Path) -> None:
    loaded(tmp_path, bzimage(init_size=48 * MIB))
    with pytest.raises(UserError, match=r"needs RAM up to 65 MiB: memory of 64 MiB"):
        loaded(tmp_path, bzimage(init_size=48 * MIB + 1))


def test_the_command_line_has_a_limit(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, bzimage(), cmdline="x" * 2047)
    (cmdline,) = ram.unpack("<I", state.rsi + 0x228)
    assert ram.text(cmdline) == b"x" * 2047
    with pytest.raises(UserError, match=r"command line of 2048 bytes: .*2047 at most"):
        loaded(tmp_path, bzimage(), cmdline="x" * 2048)
    with pytest.raises(UserError, match="command line of 65536 bytes"):
        loaded(tmp_path, bzimage(cmdline_size=0xFFFFFFFF), cmdline="x" * 65536)
    with pytest.raises(UserError, match=r"command line of 2 bytes: .* 0 at most"):
        loaded(tmp_path, bzimage(cmdline_size=0), cmdline="rw")
    with pytest.raises(UserError, match="null character"):
        loaded(tmp_path, bzimage(), cmdline="a\0b")
    with pytest.raises(UserError, match="not a text"):
        loaded(tmp_path, bzimage(), cmdline="a\ud800")


def test_the_longest_command_line_overlaps_nothing(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, bzimage(cmdline_size=0xFFFFFFFF), cmdline="é" * 32767)
    (cmdline,) = ram.unpack("<I", state.rsi + 0x228)
    assert ram.text(cmdline).decode() == "é" * 32767


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 0x020B}, r"boot protocol 2\.11: at least 2\.12"),
        ({"version": 0}, r"boot protocol 0\.00"),
        ({"loadflags": 0}, "a zImage"),
        ({"xloadflags": 0x7E}, "XLF_KERNEL_64"),
        ({"jump": 0x61EB}, "setup header starts with eb61"),
        ({"jump": 0x80EB}, "setup header starts with eb80"),
        ({"jump": 0x6AE9}, "setup header starts with e96a"),
        ({"syssize": len(CODE) // 16 + 1}, r"truncated: it has 9216 bytes of the 9232"),
        ({"syssize": 0xFFFFFFFF}, "truncated"),
        ({"syssize": 0}, "0 bytes of code"),
        ({"syssize": 0x20}, "512 bytes of code"),
        ({"setup_sects": 255, "syssize": len(CODE) // 16 + 1}, "truncated"),
        ({"kernel_alignment": 0}, "alignment is 0x0"),
        ({"kernel_alignment": 0x300000}, "alignment is 0x300000"),
        ({"pref_address": 0xFFFFF}, "preferred address is 0xfffff"),
        ({"relocatable_kernel": 0, "pref_address": 0}, "preferred address is 0x0"),
        ({"pref_address": 1 << 63}, "end of low RAM"),
        ({"pref_address": (1 << 64) - 16}, "end of low RAM"),
        ({"kernel_alignment": 1 << 31, "init_size": 1 << 31}, "end of low RAM"),
        ({"init_size": 0xFFFFFFFF}, "end of low RAM"),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, bzimage(**fields))
    assert refused(tmp_path, bzimage(**fields)).startswith(f"kernel {tmp_path / 'kernel'}: ")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = bzimage()
    for size in (*range(1, 0x300), 1023, 1024, 1025, len(whole) - 1):
        refused(tmp_path, whole[:size])


def test_an_initrd_limit_below_the_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fit"):
        loaded(tmp_path, bzimage(initrd_addr_max=0), initrd=b"x")


def test_nothing_is_written_when_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(bytes(60 * MIB))
    kernel = open_kernel(tmp_path / "kernel")
    initrd = open_initrd(tmp_path / "initrd")
    ram = WatchedRam(64 * MIB)
    with pytest.raises(UserError):
        kernel.load(ram, memory_size=64 * MIB, initrd=initrd)
    with pytest.raises(UserError):
        kernel.load(ram, memory_size=64 * MIB, cmdline="x" * 3000)
    with pytest.raises(UserError):
        kernel.load(ram, memory_size=64 * MIB + 1)
    assert not ram.written
    kernel.close()
    initrd.close()


def page_of(ram: WatchedRam, table: int, address: int) -> int:
    """Walk four-level tables with 2 MiB pages, as a CPU does."""
    for shift in (39, 30, 21):
        (entry,) = ram.unpack("<Q", table + 8 * (address >> shift & 0x1FF))
        assert entry & 3 == 3, f"{address:#x} is not mapped for writing"
        if entry & 0x80:
            assert shift == 21
            return entry & ~0x1FFFFF | address & 0x1FFFFF
        table = entry & ~0xFFF
    raise AssertionError("no page")


def test_the_64_bit_entry_state(tmp_path: Path) -> None:
    ram, state = loaded(tmp_path, bzimage())
    for address in (0, state.rsi, 0x20000, state.rip, 64 * MIB, 3 * GIB - 1, 4 * GIB - 1):
        assert page_of(ram, state.cr3, address) == address
    assert ram.unpack("<6Q", state.gdt_base) == state.gdt
    assert state.gdt_limit == 8 * len(state.gdt) - 1
    # Flat segments, in the form in which kernels and loaders commonly write them.
    assert state.gdt[2] == 0x00AF9B000000FFFF
    assert state.gdt[3] == 0x00CF93000000FFFF
    assert state.gdt[4:] == (0x00008B0000000067, 0)
    assert (state.code.selector, state.data.selector, state.tss.selector) == (0x10, 0x18, 0x20)
    assert (state.code.l, state.code.db) == (1, 0)
    assert state.cr0 & 0x80000001 == 0x80000001
    assert state.cr4 == 0x20
    assert state.efer == 0x500


def test_the_header_keeps_its_length(tmp_path: Path) -> None:
    """A longer header (up to 0x281) is copied, and nothing behind it."""
    image = bytearray(bzimage(jump=0x7FEB))
    image[0x26C:0x2A0] = b"\xaa" * 0x34
    ram, state = loaded(tmp_path, bytes(image))
    assert ram.read(state.rsi + 0x26C, 0x34) == b"\xaa" * 0x15 + bytes(0x1F)
    assert struct.unpack_from("<B", image, 0x201) == (0x7F,)
