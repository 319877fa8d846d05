"""Debian's own kernel in both forms: guest memory has the bytes of its file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab import kernel as lab_kernel
from tests.vmm.boot_images import MIB, WatchedRam
from vdev.errors import UserError
from vdev.vmm.boot import open_initrd, open_kernel

MEMORY = 256 * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def debian() -> lab_kernel.Kernel:
    return await lab_kernel.fetch()


def test_the_elf_kernel(debian: lab_kernel.Kernel, tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"initrd" * 1000)
    kernel, initrd = open_kernel(debian.image), open_initrd(tmp_path / "initrd")
    ram = WatchedRam(MEMORY)
    state = kernel.load(ram, memory_size=MEMORY, initrd=initrd, cmdline="console=ttyS0")
    kernel.close()
    initrd.close()
    content = debian.image.read_bytes()
    offset, _, count = struct.unpack_from("<Q14xHH", content, 32)
    table = content[offset : offset + 56 * count]
    loads = [entry for entry in struct.iter_unpack("<IIQQQQQQ", table) if entry[0] == 1]
    assert len(loads) >= 3
    entered = None
    for _, flags, start, _, address, file_size, size, _ in loads:
        assert ram.read(address, file_size) == content[start : start + file_size]
        assert ram.read(address + file_size, size - file_size) == bytes(size - file_size)
        if address <= state.rip < address + file_size:
            entered = flags & 1
    assert entered, "the entry is in no executable segment"
    # Linux begins there with `cld` in 32-bit code (arch/x86/platform/pvh/head.S).
    assert ram.read(state.rip, 1) == b"\xfc"


def test_the_bzimage(debian: lab_kernel.Kernel) -> None:
    (path,) = (debian.root / "boot").glob("vmlinuz-*")
    kernel = open_kernel(path)
    ram = WatchedRam(MEMORY)
    state = kernel.load(ram, memory_size=MEMORY, cmdline="console=ttyS0")
    kernel.close()
    content = path.read_bytes()
    (segment,) = kernel.image.segments
    assert ram.read(segment.address, segment.size) == content[segment.offset :][: segment.size]
    assert state.rip == segment.address + 0x200
    # `cld; cli` (arch/x86/boot/compressed/head_64.S, startup_64).
    assert ram.read(state.rip, 2) == b"\xfc\xfa"
    # The signature of Debian's image lies behind what is loaded; nothing else does.
    assert 0 <= len(content) - segment.offset - segment.size < 4096


@pytest.mark.parametrize("form", ["vmlinux", "vmlinuz-*"])
def test_too_little_memory_is_said_before_anything_is_touched(
    debian: lab_kernel.Kernel, form: str
) -> None:
    (path,) = (debian.root / "boot").glob(form)
    kernel = open_kernel(path)
    ram = WatchedRam(32 * MIB)
    with pytest.raises(UserError, match="needs RAM up to"):
        kernel.load(ram, memory_size=32 * MIB)
    kernel.close()
    assert not ram.written


async def test_its_modules_and_its_configuration_are_no_kernels(
    debian: lab_kernel.Kernel,
) -> None:
    module, *_ = await debian.modules("virtio_rng")
    with pytest.raises(UserError, match=r"object file|compressed by xz"):
        open_kernel(module)
    (config,) = (debian.root / "boot").glob("config-*")
    with pytest.raises(UserError, match="not a kernel"):
        open_kernel(config)
