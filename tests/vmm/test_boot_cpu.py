"""What was loaded is run: guest memory under QEMU's emulated CPU, with none of its own loaders.

QEMU gets the memory that the loader filled, and for a BIOS a few instructions that set the first
vCPU's registers as `EntryState` says. It stands in for KVM where that is of no use to Linux.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from tests.lab import kernel as lab_kernel
from tests.vmm.boot_images import MIB
from vdev.vmm.boot import EntryState, open_initrd, open_kernel
from vdev.vmm.layout import ram_ranges

RSDP = 0x90000
XSDT = RSDP + 64
CMDLINE = "console=ttyS0 earlyprintk=ttyS0 reboot=t panic=-1"
INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox cat /proc/iomem
/bin/busybox sha256sum /blob
/bin/busybox reboot -f
"""


class FileRam:
    """Low RAM of a machine, mapped from its memory file."""

    def __init__(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        self._bytes = memoryview(mmap.mmap(fd, ram_ranges(size)[0].size))

    def write(self, guest_addr: int, data: bytes | memoryview) -> None:
        self._bytes[guest_addr : guest_addr + len(data)] = data

    def fill(self, guest_addr: int, size: int, file: int, offset: int) -> int:
        return os.preadv(file, [self.view(guest_addr, size)], offset)

    def view(self, guest_addr: int, size: int) -> memoryview:
        return self._bytes[guest_addr : guest_addr + size]


def bios(state: EntryState) -> bytes:
    """A ROM of 64 KiB that enters what `state` describes, from the reset vector on."""

    def to_eax(value: int) -> bytes:
        return b"\x66\xb8" + struct.pack("<I", value)

    code = b"\xfa"  # cli
    code += b"\x66\x2e\x0f\x01\x16" + struct.pack("<H", 0xFF00)  # lgdt cs:[0xff00]
    code += b"\x66\xbe" + struct.pack("<I", state.rsi)  # mov esi
    code += b"\x66\xbb" + struct.pack("<I", state.rbx)  # mov ebx
    code += to_eax(state.cr4) + b"\x0f\x22\xe0"
    code += to_eax(state.cr3) + b"\x0f\x22\xd8"
    # EFER.LMA follows from LME and paging; a guest cannot write it.
    code += b"\x66\xb9" + struct.pack("<I", 0xC0000080) + b"\x66\x31\xd2"  # mov ecx; xor edx, edx
    code += to_eax(state.efer & ~0x400) + b"\x0f\x30"  # wrmsr
    code += to_eax(state.cr0) + b"\x0f\x22\xc0"
    # mov ax; mov ds, es, ss, fs, gs
    code += b"\xb8" + struct.pack("<H", state.data.selector)
    code += b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8"
    code += b"\x66\xea" + struct.pack("<IH", state.rip, state.code.selector)  # ljmp
    rom = bytearray(0x10000)
    rom[0xF000 : 0xF000 + len(code)] = code
    rom[0xFF00:0xFF06] = struct.pack("<HI", state.gdt_limit, state.gdt_base)
    rom[0xFFF0:0xFFF3] = b"\xe9" + struct.pack("<h", 0xF000 - 0xFFF3)  # jmp
    return bytes(rom)


def summed(table: bytes, at: int, size: int) -> bytes:
    """`table` with byte `at` such that the first `size` add up to zero."""
    return table[:at] + bytes([-sum(table[:size]) & 0xFF]) + table[at + 1 :]


def acpi_tables() -> bytes:
    """A root pointer and an empty XSDT: enough for Linux to say where it found them."""
    rsdp = b"RSD PTR \0VDEVTE\2" + struct.pack("<IIQI", 0, 36, XSDT, 0)
    xsdt = b"XSDT" + struct.pack("<IBB6s8sIII", 36, 1, 0, b"VDEVTE", b"TESTTEST", 1, 0, 1)
    return summed(summed(rsdp, 8, 20), 32, 36).ljust(64, b"\0") + summed(xsdt, 9, 36)


def make_initrd(directory: Path, blob: bytes) -> Path:
    tree = directory / "tree"
    for name in ("bin", "dev", "proc"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "init").write_bytes(INIT)
    (tree / "init").chmod(0o755)
    (tree / "blob").write_bytes(blob)
    script = 'cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 >"$2"'
    subprocess.run(["sh", "-c", script, "sh", tree, directory / "initrd"], check=True)
    return directory / "initrd"


@pytest.mark.parametrize(
    ("form", "memory", "initrd_end"),
    [
        ("vmlinux", 256 * MIB, 256 * MIB),
        ("vmlinux", 4096 * MIB, 3072 * MIB),
        ("vmlinuz-*", 4096 * MIB, 2048 * MIB),
    ],
)
def test_linux_runs_and_sees_what_it_was_given(
    tmp_path: Path, form: str, memory: int, initrd_end: int
) -> None:
    debian = asyncio.run(lab_kernel.fetch())
    (path,) = (debian.root / "boot").glob(form)
    blob = os.urandom(3 * MIB)
    initrd = open_initrd(make_initrd(tmp_path, blob))
    kernel = open_kernel(path)
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    ram = FileRam(fd, memory)
    os.close(fd)
    ram.write(RSDP, acpi_tables())
    state = kernel.load(ram, memory_size=memory, initrd=initrd, cmdline=CMDLINE, rsdp=RSDP)
    kernel.close()
    initrd.close()
    (tmp_path / "bios").write_bytes(bios(state))

    # It ends when the guest's init reboots, and says so on its console before.
    qemu: list[str | Path] = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-vga", "none", "-serial", "stdio", "-accel", "tcg", "-cpu", "max"),
        *("-machine", "pc,acpi=off,memory-backend=ram,max-ram-below-4g=3G"),
        *("-m", str(memory // MIB), "-bios", tmp_path / "bios"),
        *("-object", f"memory-backend-file,id=ram,share=on,size={memory},mem-path={tmp_path}/ram"),
    ]
    done = subprocess.run(qemu, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    (tmp_path / "ram").unlink()
    console = done.stdout.decode(errors="replace").replace("\r", "")

    assert f"Kernel command line: {CMDLINE}\n" in console
    assert re.search(rf"RAMDISK: \[mem 0x[0-9a-f]+-{initrd_end - 1:#010x}\]", console)
    assert f"ACPI: RSDP 0x{RSDP:016X} 000024 (v02 VDEVTE)" in console
    assert f"{hashlib.sha256(blob).hexdigest()}  /blob\n" in console
    low_end = min(memory, 3072 * MIB)
    for line in (
        "00001000-0009fbff : System RAM",
        "000f0000-000fefff : ACPI Tables",
        f"00100000-{low_end - 1:08x} : System RAM",
        "e0000000-e00fffff : Reserved",
    ):
        assert re.search(rf"\n *{re.escape(line)}\n", console)
    above = f"\n100000000-{0x100000000 + memory - low_end - 1:x} : System RAM\n"
    assert (above in console) == (memory > low_end)
