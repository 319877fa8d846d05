"""bzImage: a Linux kernel that decompresses itself, entered by the 64-bit boot protocol.

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst; field names are theirs.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vdev.errors import UserError
from vdev.vmm.boot.entry import CMDLINE_AREA, INFO, EntryState, GuestRam, long64
from vdev.vmm.boot.file import BootFile
from vdev.vmm.boot.image import BootInfo, LoadSegment
from vdev.vmm.layout import KERNEL_BASE, LOW_RAM_MAX, PAGE

_HEADER = 0x1F1
_HEADER_END_MIN = 0x264
"""Behind init_size, the last field that is used here."""
_HEADER_END_MAX = 0x281
"""The jump over the header reaches no further."""
_VERSION_MIN = 0x020C
_SECTOR = 512
_ENTRY64 = 0x200

_LOADED_HIGH = 1
_XLF_KERNEL_64 = 1

_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_TYPE_OF_LOADER = 0x210
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_CMD_LINE_PTR = 0x228
_HARDWARE_SUBARCH = 0x23C
_SETUP_DATA = 0x250
_E820_TABLE = 0x2D0
_VID_MODE_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF


class BzImage(NamedTuple):
    """A checked bzImage; an `Image`."""

    setup_header: bytes
    """From 0x1f1 of the file on."""
    segments: tuple[LoadSegment, ...]
    end: int
    entry: int
    initrd_end: int
    cmdline_max: int

    def enter(self, ram: GuestRam, info: BootInfo) -> EntryState:
        """Write boot_params; see `Image`."""
        params = bytearray(PAGE)
        params[_HEADER : _HEADER + len(self.setup_header)] = self.setup_header
        struct.pack_into("<Q", params, _ACPI_RSDP_ADDR, info.rsdp)
        struct.pack_into("<H", params, _VID_MODE, _VID_MODE_NORMAL)
        struct.pack_into("<B", params, _TYPE_OF_LOADER, _LOADER_UNDEFINED)
        struct.pack_into("<I", params, _CODE32_START, self.segments[0].address)
        struct.pack_into("<II", params, _RAMDISK_IMAGE, info.initrd, info.initrd_size)
        struct.pack_into("<I", params, _CMD_LINE_PTR, info.cmdline)
        # These are ours to write: whatever the file has there must not lead the kernel anywhere.
        struct.pack_into("<IQ", params, _HARDWARE_SUBARCH, 0, 0)
        struct.pack_into("<Q", params, _SETUP_DATA, 0)
        params[_E820_ENTRIES] = len(info.memory)
        for index, entry in enumerate(info.memory):
            struct.pack_into("<QQI", params, _E820_TABLE + index * 20, *entry)
        ram.write(INFO, bytes(params))
        return long64(ram, self.entry, INFO)


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with `head` has Linux's setup header."""
    return head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa"


def parse(file: BootFile, head: bytes) -> BzImage:
    """Check the bzImage `file`, which starts with `head`. Raises UserError.

    A relocatable kernel goes to its preferred address, any other to 1 MiB, from where it moves
    itself to its preferred address.
    """
    name = file.name
    if len(head) < _HEADER_END_MAX:
        raise UserError(f"{name}: truncated within its setup header: it has {file.size} bytes")
    (version,) = struct.unpack_from("<H", head, 0x206)
    if version < _VERSION_MIN:
        raise UserError(
            f"{name}: boot protocol {version >> 8}.{version & 0xFF:02}: "
            "at least 2.12 is needed (Linux 3.8)"
        )
    jump, distance = struct.unpack_from("<2B", head, 0x200)
    header_end = 0x202 + distance
    if jump != 0xEB or not _HEADER_END_MIN <= header_end <= _HEADER_END_MAX:
        raise UserError(
            f"{name}: its setup header starts with {head[0x200:0x202].hex()}: a jump to "
            f"{_HEADER_END_MIN:#x} to {_HEADER_END_MAX:#x} is needed"
        )
    setup_sects, _, syssize = struct.unpack_from("<BHI", head, _HEADER)
    (loadflags,) = struct.unpack_from("<B", head, 0x211)
    initrd_addr_max, alignment, relocatable, _, xloadflags, cmdline_size = struct.unpack_from(
        "<IIBBHI", head, 0x22C
    )
    pref_address, init_size = struct.unpack_from("<QI", head, 0x258)
    if not loadflags & _LOADED_HIGH:
        raise UserError(f"{name}: a zImage, which loads below 1 MiB: a bzImage is needed")
    if not xloadflags & _XLF_KERNEL_64:
        raise UserError(
            f"{name}: no 64-bit entry (XLF_KERNEL_64 is not set): a 64-bit kernel is needed"
        )
    # boot.rst, setup_sects: 0 stands for 4; the boot sector itself is not counted.
    offset = ((setup_sects or 4) + 1) * _SECTOR
    size = syssize * 16
    if offset + size > file.size:
        raise UserError(
            f"{name}: truncated: it has {file.size} bytes of the {offset + size} in its header"
        )
    if size <= _ENTRY64:
        raise UserError(f"{name}: its header tells of {size} bytes of code, which has no entry")

    start = _runtime_start(name, pref_address, alignment, relocatable)
    address = pref_address if relocatable and pref_address else KERNEL_BASE
    end = max(address + size, start + init_size)
    if end > LOW_RAM_MAX:
        raise UserError(
            f"{name}: it would run up to {end:#x}: the end of low RAM is {LOW_RAM_MAX:#x} at most"
        )
    return BzImage(
        setup_header=head[_HEADER:header_end],
        segments=(LoadSegment(address, size, offset, size),),
        end=end,
        entry=address + _ENTRY64,
        initrd_end=initrd_addr_max + 1,
        cmdline_max=min(cmdline_size, CMDLINE_AREA - 1),
    )


def _runtime_start(name: str, pref_address: int, alignment: int, relocatable: int) -> int:
    """Where the kernel will run (boot.rst, init_size)."""
    # Zero is no preference, but a kernel that cannot be relocated has to run somewhere.
    if pref_address < KERNEL_BASE and (pref_address or not relocatable):
        raise UserError(
            f"{name}: its preferred address is {pref_address:#x}: at least {KERNEL_BASE:#x}"
        )
    if not relocatable:
        return pref_address
    if not alignment or alignment & (alignment - 1):
        raise UserError(f"{name}: its alignment is {alignment:#x}: a power of two is needed")
    return (pref_address or KERNEL_BASE) + alignment - 1 & -alignment
