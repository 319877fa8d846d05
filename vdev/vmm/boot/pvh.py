"""An ELF kernel with a PVH note: nothing to decompress, entered in 32-bit protected mode.

Sources: System V ABI, chapters 4 and 5; Xen, docs/misc/pvh.pandoc and
xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from vdev.errors import UserError
from vdev.vmm.boot.entry import INFO, EntryState, GuestRam, protected32
from vdev.vmm.boot.file import BootFile
from vdev.vmm.boot.image import BootInfo, LoadSegment
from vdev.vmm.layout import HIGH_RAM_BASE, KERNEL_BASE, LOW_RAM_MAX, PAGE

ELF_MAGIC = b"\x7fELF"
_CLASS64, _LITTLE_ENDIAN = 2, 1
_EXEC, _DYN = 2, 3
_X86_64 = 62
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PROGRAM_HEADERS_MAX = 256
_PT_LOAD, _PT_NOTE = 1, 4
_NOTES_MAX = 1 << 16
_XEN = b"Xen\0"
_PHYS32_ENTRY = 18

_LINUX_CMDLINE_MAX = 2047
"""No note tells of a limit; this is Linux's own."""

_START_INFO = struct.Struct("<IIIIQQQQII")
_START_MAGIC = 0x336EC578
_MODULE = struct.Struct("<QQQQ")
_MEMORY = struct.Struct("<QQII")
_MODULES = INFO + 64
_MEMORY_MAP = _MODULES + _MODULE.size
_MEMORY_MAP_MAX = (INFO + PAGE - _MEMORY_MAP) // _MEMORY.size

_TYPES = {1: "an object file, perhaps a kernel module", 4: "a core dump"}


class PvhImage(NamedTuple):
    """A checked ELF kernel; an `Image`."""

    segments: tuple[LoadSegment, ...]
    entry: int
    initrd_end: int = HIGH_RAM_BASE
    cmdline_max: int = _LINUX_CMDLINE_MAX

    @property
    def end(self) -> int:
        """The end of its last segment."""
        return self.segments[-1].end

    def enter(self, ram: GuestRam, info: BootInfo) -> EntryState:
        """Write hvm_start_info, version 1; see `Image`."""
        assert len(info.memory) <= _MEMORY_MAP_MAX
        start = _START_INFO.pack(
            _START_MAGIC,
            1,
            0,
            1 if info.initrd_size else 0,
            _MODULES if info.initrd_size else 0,
            info.cmdline,
            info.rsdp,
            _MEMORY_MAP,
            len(info.memory),
            0,
        )
        ram.write(INFO, start.ljust(_MODULES - INFO, b"\0"))
        ram.write(_MODULES, _MODULE.pack(info.initrd, info.initrd_size, 0, 0))
        ram.write(_MEMORY_MAP, b"".join(_MEMORY.pack(*entry, 0) for entry in info.memory))
        return protected32(ram, self.entry, INFO)


def parse(file: BootFile, head: bytes) -> PvhImage:
    """Check the ELF kernel `file`, which starts with `head`. Raises UserError."""
    headers = _program_headers(file, head)
    segments = _segments(file, headers)
    entry = _entry(file, headers)
    if not any(part.address <= entry < part.address + part.file_size for part in segments):
        raise UserError(f"{file.name}: its PVH entry {entry:#x} is in none of its segments")
    return PvhImage(segments, entry)


def _program_headers(file: BootFile, head: bytes) -> list[tuple[int, ...]]:
    name = file.name
    if len(head) < _HEADER.size:
        raise UserError(f"{name}: an ELF file that is truncated after {len(head)} bytes")
    if head[4] != _CLASS64 or head[5] != _LITTLE_ENDIAN:
        kind = "a 32-bit ELF file" if head[4] == 1 else "an ELF file of another byte order"
        raise UserError(f"{name}: {kind}: a 64-bit kernel for x86 is needed")
    _, kind, machine, _, _, offset, _, _, _, entry_size, count, _, _, _ = _HEADER.unpack_from(head)
    if machine != _X86_64:
        raise UserError(f"{name}: an ELF file for machine {machine}: {_X86_64} (x86-64) is needed")
    if kind not in (_EXEC, _DYN):
        what = _TYPES.get(kind, f"an ELF file of type {kind}")
        raise UserError(f"{name}: {what}: an executable kernel (vmlinux) is needed")
    if not 0 < count <= _PROGRAM_HEADERS_MAX or entry_size != _PROGRAM_HEADER.size:
        raise UserError(
            f"{name}: {count} program headers of {entry_size} bytes: "
            f"1 to {_PROGRAM_HEADERS_MAX} of {_PROGRAM_HEADER.size} would be right"
        )
    size = count * _PROGRAM_HEADER.size
    _check_range(file, "program headers", offset, size)
    table = head[offset : offset + size]
    if len(table) < size:
        table = file.read(offset, size)
    if len(table) < size:
        raise UserError(f"{name}: truncated: its program headers are cut off")
    return list(_PROGRAM_HEADER.iter_unpack(table))


def _check_range(file: BootFile, what: str, offset: int, size: int) -> None:
    if offset + size > file.size:
        raise UserError(
            f"{file.name}: truncated: its {what} end at {offset + size} of {file.size} bytes"
        )


def _segments(file: BootFile, headers: list[tuple[int, ...]]) -> tuple[LoadSegment, ...]:
    segments = []
    for kind, _, offset, _, address, file_size, size, _ in headers:
        if kind != _PT_LOAD or not size:
            continue
        if file_size > size:
            raise UserError(
                f"{file.name}: a segment has {file_size} bytes in the file but {size} in memory"
            )
        _check_range(file, "segments", offset, file_size)
        if address < KERNEL_BASE or address + size > LOW_RAM_MAX:
            raise UserError(
                f"{file.name}: a segment at {address:#x} to {address + size:#x}: "
                f"{KERNEL_BASE:#x} to {LOW_RAM_MAX:#x} is there for kernels"
            )
        segments.append(LoadSegment(address, size, offset, file_size))
    if not segments:
        raise UserError(f"{file.name}: no segment to load: an executable kernel is needed")
    segments.sort(key=lambda segment: segment.address)
    for lower, upper in pairwise(segments):
        if lower.end > upper.address:
            raise UserError(
                f"{file.name}: its segments at {lower.address:#x} and {upper.address:#x} overlap"
            )
    return tuple(segments)


def _entry(file: BootFile, headers: list[tuple[int, ...]]) -> int:
    total = 0
    for kind, _, offset, _, _, size, _, alignment in headers:
        if kind != _PT_NOTE:
            continue
        _check_range(file, "notes", offset, size)
        total += size
        if total > _NOTES_MAX:
            raise UserError(f"{file.name}: {total} bytes of notes: {_NOTES_MAX} at most")
        for owner, note, value in _notes(file.read(offset, size), 8 if alignment == 8 else 4):
            # Linux wrote eight bytes here before it wrote the four of the specification.
            if owner == _XEN and note == _PHYS32_ENTRY and len(value) in (4, 8):
                return int.from_bytes(value, "little")
    raise UserError(
        f"{file.name}: an ELF file without a PVH entry note: a kernel with CONFIG_PVH, "
        "or a bzImage, is needed"
    )


def _notes(data: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and value of the notes that are whole."""
    position = 0
    while position + 12 <= len(data):
        owner_size, value_size, kind = struct.unpack_from("<III", data, position)
        owner = position + 12
        value = owner + owner_size + (-(12 + owner_size) % alignment)
        end = value + value_size
        if end > len(data):
            return
        yield data[owner : owner + owner_size], kind, data[value:end]
        position = end + -end % alignment
