"""Kernels as an attacker makes them: each is loaded within RAM, or refused by a `UserError`."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vmm.boot_images import (
    MIB,
    SETUP_FIELDS,
    WatchedRam,
    bzimage,
    elf,
    memory_file,
    note,
    pvh_note,
)
from vdev.errors import UserError
from vdev.vmm.boot import open_initrd, open_kernel

MEMORY = 32 * MIB
KERNEL = [(0x1000000, b"text" * 100, 0x400), (0x1200000, b"data" * 100, 0x1000)]
RAM = WatchedRam(MEMORY)

small = st.integers(0, 0x2000)
edges = st.sampled_from(
    [edge + step for edge in (0, 1 << 20, 1 << 24, MEMORY, 1 << 31, 3 << 30, 1 << 32, 1 << 63)
     for step in (-1, 0, 1)] + [(1 << 64) - 1]
)  # fmt: skip
numbers = st.one_of(small, edges, st.integers(0, (1 << 64) - 1))


def outcome(image: bytes, *, initrd: bytes = b"initrd", cmdline: str = "quiet") -> bool:
    """Whether `image` was loaded. `WatchedRam` fails the test where a write is out of place."""
    RAM.written.clear()
    with memory_file(image) as path, memory_file(initrd) as ramdisk_path:
        ramdisk = open_initrd(ramdisk_path)
        kernel = None
        try:
            kernel = open_kernel(path)
            state = kernel.load(RAM, memory_size=MEMORY, initrd=ramdisk, cmdline=cmdline)
        except UserError:
            return False
        finally:
            ramdisk.close()
            if kernel:
                kernel.close()
    inside = [start <= state.rip < end for start, end in RAM.written if start >= MIB]
    assert any(inside), "the entry is in nothing that was loaded"
    return True


def replaced(image: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    result = bytearray(image)
    for position, value in changes:
        result[position : position + len(value)] = value
    return bytes(result)


def changes_of(size: int) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    return st.lists(st.tuples(st.integers(0, size), st.binary(min_size=1, max_size=8)), max_size=6)


def test_the_images_that_are_mutated_are_sound() -> None:
    assert outcome(bzimage())
    assert outcome(elf(KERNEL))


@given(st.binary(max_size=2048))
def test_random_bytes(content: bytes) -> None:
    if content:
        assert not outcome(content)


@given(st.binary(min_size=64, max_size=700))
def test_random_bytes_behind_the_magic_of_linux(content: bytes) -> None:
    outcome(replaced(content.ljust(0x300, b"\0"), [(0x1FE, b"\x55\xaa"), (0x202, b"HdrS")]))


@given(st.binary(max_size=700))
def test_random_bytes_behind_the_magic_of_elf(content: bytes) -> None:
    outcome(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + content)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(SETUP_FIELDS)), numbers, max_size=5))
@example({"pref_address": MEMORY - 8192, "init_size": 0})
@example({"initrd_addr_max": 0x1000000 + 4 * MIB - 1})
@example({"relocatable_kernel": 0, "pref_address": 1 << 20})
def test_any_field_of_a_setup_header(fields: dict[str, int]) -> None:
    fields = {
        name: value % (1 << 8 * struct.calcsize(SETUP_FIELDS[name][1]))
        for name, value in fields.items()
    }
    outcome(bzimage(**fields))


@settings(max_examples=300)
@given(changes_of(0x280), st.integers(1, 9216))
def test_a_mutated_and_cut_bzimage(changes: list[tuple[int, bytes]], size: int) -> None:
    image = replaced(bzimage(), changes)
    outcome(image)
    outcome(image[:size])


@settings(max_examples=300)
@given(changes_of(64 + 3 * 56), st.integers(1, 0x1400))
def test_a_mutated_and_cut_elf(changes: list[tuple[int, bytes]], size: int) -> None:
    image = replaced(elf(KERNEL), changes)
    outcome(image)
    outcome(image[:size])


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), numbers), max_size=4),
    st.sampled_from([0, 1, 4, 8, 1 << 63]),
)
@example([(0, 2, 0x1000000), (0, 4, MEMORY - 0x1000000)], 4)
@example([(0, 2, MEMORY - 0x400)], 4)
def test_any_field_of_program_headers(changes: list[tuple[int, int, int]], alignment: int) -> None:
    """Field 0 is the offset, 2 the physical address, 3 and 4 the sizes."""
    image = elf(KERNEL, note_alignment=alignment)
    outcome(
        replaced(
            image,
            [(64 + 56 * row + 8 + 8 * field, struct.pack("<Q", value % (1 << 64)))
             for row, field, value in changes],
        )
    )  # fmt: skip


@given(st.binary(max_size=200), numbers, st.sampled_from([0, 4, 8]))
def test_any_notes(garbage: bytes, entry: int, alignment: int) -> None:
    outcome(elf(KERNEL, garbage, note_alignment=alignment))
    outcome(elf(KERNEL, garbage + pvh_note(0x1000000), note_alignment=alignment))
    value = struct.pack("<Q", entry % (1 << 64))
    loaded = outcome(elf(KERNEL, note(b"Xen\0", 18, value) + garbage))
    assert loaded == any(at <= entry < at + len(text) for at, text, _ in KERNEL)


@given(st.text(max_size=3000), st.integers(1, 1 << 16))
def test_any_command_line_and_initrd(cmdline: str, size: int) -> None:
    size = min(size * 512, MEMORY)
    fits = len(cmdline.encode()) <= 2047 and "\0" not in cmdline
    room = MEMORY - 0x1000000 - 4 * MIB
    assert outcome(bzimage(), initrd=bytes(size), cmdline=cmdline) == (fits and size <= room)
