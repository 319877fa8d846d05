"""What the two kinds of kernel have in common once their file has been checked."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from vdev.vmm.boot.entry import EntryState, GuestRam
from vdev.vmm.boot.memory_map import MapEntry


class LoadSegment(NamedTuple):
    """`file_size` bytes at `offset` of the file go to guest `address`; zeroes up to `size`."""

    address: int
    size: int
    offset: int
    file_size: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


class BootInfo(NamedTuple):
    """What a kernel is told: addresses and sizes in bytes, 0 for what is not there."""

    cmdline: int
    initrd: int
    initrd_size: int
    rsdp: int
    memory: tuple[MapEntry, ...]


class Image(Protocol):
    """A kernel whose file is sound: all that does not depend on the machine has been checked."""

    @property
    def segments(self) -> tuple[LoadSegment, ...]:
        """Sorted by address; they do not overlap and none lies below KERNEL_BASE."""

    @property
    def end(self) -> int:
        """The first address that the kernel leaves alone until it has read its memory map."""

    @property
    def entry(self) -> int:
        """Its first instruction, which lies in a segment."""

    @property
    def initrd_end(self) -> int:
        """The first address at which no initrd may lie any more."""

    @property
    def cmdline_max(self) -> int:
        """How many bytes of command line it takes, the terminating zero not counted."""

    def enter(self, ram: GuestRam, info: BootInfo) -> EntryState:
        """Write what the kernel is told, and say how it is entered."""
