"""Kernels and initrds: opened and checked first, loaded into a guest as often as it boots."""

from __future__ import annotations

import os
from typing import NamedTuple

from vdev.errors import UserError
from vdev.vmm.boot import bzimage, pvh
from vdev.vmm.boot.entry import CMDLINE, EntryState, GuestRam
from vdev.vmm.boot.file import BootFile
from vdev.vmm.boot.image import BootInfo, Image
from vdev.vmm.boot.memory_map import memory_map
from vdev.vmm.layout import MIB, PAGE, ram_ranges

_HEAD = 4096
_ZEROES = MIB
"""How much is cleared at once."""

# (offset, bytes, what such a file is and what to do with it)
_OTHERS = (
    (0, b"\x1f\x8b", "compressed by gzip: unpack it, or give the bzImage"),
    (0, b"\xfd7zXZ\0", "compressed by xz: unpack it, or give the bzImage"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it, or give the bzImage"),
    (0, b"BZh", "compressed by bzip2: unpack it, or give the bzImage"),
    (0, b"\x02\x21\x4c\x18", "compressed by lz4: unpack it, or give the bzImage"),
    (0, b"070701", "a cpio archive: that is an initrd"),
    (0, b"QFI\xfb", "a qcow2 image: that is a disk"),
    (56, b"ARM\x64", "a kernel for ARM: one for x86-64 is needed"),
    (
        0,
        b"MZ",
        "an EFI program without Linux's setup header (a unified or zboot image?): "
        "the kernel inside is needed",
    ),
    (0, b"#!", "a script"),
    (0x8001, b"CD001", "an ISO 9660 image: that is a disk"),
)


class Initrd(BootFile):
    """An initial RAM disk, held open. Its content is the kernel's business."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`. Raises UserError, see `BootFile`."""
        super().__init__("initrd", path)


class Placement(NamedTuple):
    """Where a kernel's companions go in one machine: checked, nothing written yet."""

    cmdline: bytes
    """With its terminating zero."""
    info: BootInfo


class Kernel:
    """A kernel whose file has been checked and is held open until `close`."""

    def __init__(self, file: BootFile, image: Image) -> None:
        """`image` is what a parser found in `file`."""
        self.image = image
        self._file = file

    def place(
        self, *, memory_size: int, initrd: Initrd | None = None, cmdline: str = "", rsdp: int = 0
    ) -> Placement:
        """Check that the kernel can run with all this, and say where it goes.

        `memory_size` is in bytes; `rsdp` is the guest address of ACPI's root pointer, 0 for none.
        Raises UserError: too little memory, no room for the initrd, command line too long.
        """
        text = self._encode(cmdline)
        low_end = ram_ranges(memory_size)[0].size
        image = self.image
        if image.end > low_end:
            raise UserError(
                f"{self._file.name}: it needs RAM up to {_mib(image.end)} MiB: "
                f"memory of {memory_size // MIB} MiB ends below that"
            )
        address = self._place_initrd(initrd, low_end) if initrd else 0
        info = BootInfo(
            cmdline=CMDLINE,
            initrd=address,
            initrd_size=initrd.size if initrd else 0,
            rsdp=rsdp,
            memory=memory_map(memory_size),
        )
        return Placement(text, info)

    def load(
        self,
        ram: GuestRam,
        *,
        memory_size: int,
        initrd: Initrd | None = None,
        cmdline: str = "",
        rsdp: int = 0,
    ) -> EntryState:
        """Write the kernel and all that it starts from into `ram`; once for each boot.

        Raises UserError as `place` does, before anything is written; later only where a file
        cannot be read any more or has shrunk, and then the guest must not run.
        """
        placement = self.place(memory_size=memory_size, initrd=initrd, cmdline=cmdline, rsdp=rsdp)
        for segment in self.image.segments:
            self._file.load(ram, segment.address, segment.file_size, segment.offset)
            if (rest := segment.size - segment.file_size) > 0:
                _clear(ram.view(segment.address + segment.file_size, rest))
        info = placement.info
        if initrd:
            initrd.load(ram, info.initrd, info.initrd_size, 0)
        ram.write(info.cmdline, placement.cmdline)
        return self.image.enter(ram, info)

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        self._file.close()

    def _encode(self, cmdline: str) -> bytes:
        # Bytes that are no UTF-8 come from the shell as surrogates, and go on as they came.
        try:
            text = os.fsencode(cmdline)
        except UnicodeEncodeError:
            raise UserError(f"command line {cmdline!r}: not a text") from None
        if b"\0" in text:
            raise UserError(f"command line {cmdline!r}: it may have no null character")
        if len(text) > self.image.cmdline_max:
            raise UserError(
                f"command line of {len(text)} bytes: {self._file.name} takes "
                f"{self.image.cmdline_max} at most"
            )
        return text + b"\0"

    def _place_initrd(self, initrd: Initrd, low_end: int) -> int:
        """As high as it may lie, so that the kernel has room to unpack itself below."""
        top = min(low_end, self.image.initrd_end)
        address = (top - initrd.size) // PAGE * PAGE
        if address < self.image.end:
            raise UserError(
                f"{initrd.name}: {initrd.size} bytes do not fit between the kernel, which needs "
                f"RAM up to {_mib(self.image.end)} MiB, and the {top // MIB} MiB that an initrd "
                "may reach up to: more memory, or a smaller initrd"
            )
        return address


def open_kernel(path: str | os.PathLike[str]) -> Kernel:
    """Open the kernel `path` and check all that does not depend on the machine.

    It may be a bzImage (boot protocol 2.12 or later, with a 64-bit entry) or an ELF file with a
    PVH entry note. Raises UserError, which says what the file looks like instead.
    """
    file = BootFile("kernel", path)
    try:
        return Kernel(file, _parse(file))
    except BaseException:
        file.close()
        raise


def open_initrd(path: str | os.PathLike[str]) -> Initrd:
    """Open the initrd `path`. Raises UserError where it cannot be read, or is empty."""
    return Initrd(path)


def _parse(file: BootFile) -> Image:
    head = file.read(0, _HEAD)
    if bzimage.is_bzimage(head):
        return bzimage.parse(file, head)
    if head.startswith(pvh.ELF_MAGIC):
        return pvh.parse(file, head)
    for offset, magic, what in _OTHERS:
        if file.read(offset, len(magic)) == magic:
            raise UserError(f"{file.name}: {what}")
    raise UserError(
        f"{file.name}: not a kernel (it starts with {head[:8].hex()}): a bzImage, or an ELF "
        "kernel with a PVH entry, is needed"
    )


def _clear(view: memoryview) -> None:
    for start in range(0, len(view), _ZEROES):
        part = view[start : start + _ZEROES]
        part[:] = bytes(len(part))


def _mib(size: int) -> int:
    return -(-size // MIB)
