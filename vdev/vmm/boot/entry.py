"""The state of the first vCPU, and the boot data below 640 KiB that it refers to.

```
0x7000   boot_params, or hvm_start_info with its tables
0x8000   GDT
0x9000   PML4, 0xa000 PDPT, 0xb000-0xefff PDs: the first 4 GiB, identity mapped
0x20000  command line, up to 64 KiB
```

Linux copies all of it before it gives this memory to anybody.
"""

from __future__ import annotations

import struct
from array import array
from typing import Literal, NamedTuple, Protocol

from vdev.vmm.layout import BOOT_DATA, GIB, MIB, PAGE

INFO = BOOT_DATA
GDT = 0x8000
_PML4 = 0x9000
_PDPT = 0xA000
_PD = 0xB000
_PDS = 4
CMDLINE = 0x20000
CMDLINE_AREA = 0x10000

_CR0_PE, _CR0_ET, _CR0_PG = 1, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_PTE_TABLE = 0x3
"""Present, writable."""
_PTE_2M = 0x83
"""Present, writable, a page of 2 MiB."""


class GuestRam(Protocol):
    """The guest's memory, as far as a loader needs it. All raise ValueError outside of RAM."""

    def write(self, guest_addr: int, data: bytes | memoryview) -> None:
        """Copy `data` to `guest_addr`."""

    def fill(self, guest_addr: int, size: int, file: int, offset: int) -> int:
        """Copy at most `size` bytes from `offset` of a file; returns how many, 0 at its end.

        Raises OSError where it cannot be read.
        """

    def view(self, guest_addr: int, size: int) -> memoryview:
        """The writable bytes [guest_addr, guest_addr + size), which lie in one range of RAM."""


class Segment(NamedTuple):
    """A segment register; the fields are those of KVM's `struct kvm_segment`."""

    selector: int
    base: int
    limit: int
    """In bytes, also where `g` says that the descriptor counts pages."""
    type: int
    s: int
    db: int = 0
    l: int = 0  # noqa: E741 (the manual's own letter)
    g: int = 0
    dpl: int = 0
    present: int = 1
    avl: int = 0

    def descriptor(self) -> int:
        """Its GDT entry (Intel SDM volume 3, 3.4.5)."""
        limit = self.limit >> 12 if self.g else self.limit
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFFFFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


# __BOOT_CS and __BOOT_DS are 0x10 and 0x18 (boot.rst, 64-bit Boot Protocol); all are "accessed".
_CODE64 = Segment(0x10, 0, 0xFFFFFFFF, type=11, s=1, l=1, g=1)
_CODE32 = Segment(0x10, 0, 0xFFFFFFFF, type=11, s=1, db=1, g=1)
_DATA = Segment(0x18, 0, 0xFFFFFFFF, type=3, s=1, db=1, g=1)
# A busy TSS; its upper half, which long mode has, is the zero entry behind it.
_TSS = Segment(0x20, 0, 0x67, type=11, s=0)
_GDT_ENTRIES = 6


class EntryState(NamedTuple):
    """Registers of the first vCPU; rflags is 2, and what is not named here is zero.

    `data` goes into ds, es, fs, gs and ss.
    """

    mode: Literal["long64", "protected32"]
    rip: int
    rsi: int
    """boot_params, in mode "long64"."""
    rbx: int
    """hvm_start_info, in mode "protected32"."""
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdt_base: int
    gdt_limit: int
    gdt: tuple[int, ...]
    code: Segment
    data: Segment
    tss: Segment


def long64(ram: GuestRam, rip: int, boot_params: int) -> EntryState:
    """Write GDT and page tables; the state that the Linux 64-bit boot protocol asks for."""
    ram.write(_PML4, struct.pack("<Q", _PDPT | _PTE_TABLE).ljust(PAGE, b"\0"))
    tables = (_PD + index * PAGE | _PTE_TABLE for index in range(_PDS))
    ram.write(_PDPT, struct.pack("<4Q", *tables).ljust(PAGE, b"\0"))
    ram.write(_PD, array("Q", range(_PTE_2M, _PDS * GIB, 2 * MIB)).tobytes())
    return EntryState(
        mode="long64",
        rip=rip,
        rsi=boot_params,
        rbx=0,
        cr0=_CR0_PE | _CR0_ET | _CR0_PG,
        cr3=_PML4,
        cr4=_CR4_PAE,
        efer=_EFER_LME | _EFER_LMA,
        gdt_base=GDT,
        gdt_limit=_GDT_ENTRIES * 8 - 1,
        gdt=_write_gdt(ram, _CODE64),
        code=_CODE64,
        data=_DATA,
        tss=_TSS,
    )


def protected32(ram: GuestRam, rip: int, start_info: int) -> EntryState:
    """Write the GDT; the state that the PVH boot ABI asks for (Xen, docs/misc/pvh.pandoc)."""
    return EntryState(
        mode="protected32",
        rip=rip,
        rsi=0,
        rbx=start_info,
        cr0=_CR0_PE | _CR0_ET,
        cr3=0,
        cr4=0,
        efer=0,
        gdt_base=GDT,
        gdt_limit=_GDT_ENTRIES * 8 - 1,
        gdt=_write_gdt(ram, _CODE32),
        code=_CODE32,
        data=_DATA,
        tss=_TSS,
    )


def _write_gdt(ram: GuestRam, code: Segment) -> tuple[int, ...]:
    entries = [0] * _GDT_ENTRIES
    for segment in (code, _DATA, _TSS):
        entries[segment.selector // 8] = segment.descriptor()
    ram.write(GDT, struct.pack(f"<{_GDT_ENTRIES}Q", *entries))
    return tuple(entries)
