"""Kernels and initrds as files: what is not one, what changes, and how few things are imported."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmm.boot_images import CODE, MIB, WatchedRam, bzimage, elf
from vdev.errors import UserError
from vdev.vmm.boot import open_initrd, open_kernel

KERNEL = [(0x1000000, b"text" * 1000, 0x2000)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"x", "not a kernel (it starts with 78)"),
        (bytes(1 << 16), "not a kernel (it starts with 0000000000000000)"),
        (gzip.compress(bytes(100)), "compressed by gzip"),
        (lzma.compress(bytes(100)), "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "compressed by zstd"),
        (b"BZh9" + bytes(100), "compressed by bzip2"),
        (b"\x02\x21\x4c\x18" + bytes(100), "compressed by lz4"),
        (b"070701" + bytes(100), "that is an initrd"),
        (b"QFI\xfb" + bytes(100), "that is a disk"),
        (bytes(0x8001) + b"CD001", "that is a disk"),
        (b"MZ" + bytes(1000), "an EFI program without Linux's setup header"),
        (b"MZ" + bytes(54) + b"ARM\x64", "a kernel for ARM"),
        (b"#!/bin/sh\n", "a script"),
    ],
)
def test_what_is_no_kernel_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_kernel(path)
    assert str(caught.value).startswith(f"kernel {path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("opener", [open_kernel, open_initrd])
async def test_what_cannot_be_opened_is_named(
    tmp_path: Path,
    opener: Callable[[str | os.PathLike[str]], object],
    fd_count: Callable[[], Counter[str]],
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    before = fd_count()
    for name, message in (
        ("missing", "no such file"),
        ("pipe", "not a regular file"),
        (".", "a directory"),
        ("loop", "Too many levels"),
        ("empty", "an empty file"),
        ("empty/below", "Not a directory"),
        ("nu\0ll", "null character"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            opener(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        opener("/dev/null")
    assert fd_count() == before


async def test_a_refused_kernel_leaves_no_descriptor(
    tmp_path: Path, fd_count: Callable[[], Counter[str]]
) -> None:
    (tmp_path / "kernel").write_bytes(bzimage(loadflags=0))
    before = fd_count()
    with pytest.raises(UserError):
        open_kernel(tmp_path / "kernel")
    assert fd_count() == before


@pytest.mark.parametrize("image", [bzimage(), elf(KERNEL)], ids=["bzImage", "ELF"])
def test_a_reboot_loads_the_same_file_again(tmp_path: Path, image: bytes) -> None:
    """The path may be gone or lead elsewhere by then, and RAM holds what the guest left."""
    path = tmp_path / "kernel"
    path.write_bytes(image)
    kernel = open_kernel(path)
    first = WatchedRam(32 * MIB)
    entry = kernel.load(first, memory_size=32 * MIB, cmdline="one")
    path.unlink()
    path.write_bytes(b"another")
    second = WatchedRam(32 * MIB, filled=b"\xee")
    assert kernel.load(second, memory_size=32 * MIB, cmdline="one") == entry
    kernel.close()
    kernel.close()
    assert second.written == first.written
    for start, end in first.written:
        assert second.read(start, end - start) == first.read(start, end - start)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    kernel_path, initrd_path = tmp_path / "kernel", tmp_path / "initrd"
    kernel_path.write_bytes(bzimage())
    initrd_path.write_bytes(bytes(5000))
    kernel, initrd = open_kernel(kernel_path), open_initrd(initrd_path)
    os.truncate(initrd_path, 4999)
    with pytest.raises(UserError, match=r"initrd .* truncated to 4999 bytes .* had 5000"):
        kernel.load(WatchedRam(32 * MIB), memory_size=32 * MIB, initrd=initrd)
    os.truncate(kernel_path, 2000)
    with pytest.raises(UserError, match=r"kernel .* truncated to 2000 bytes .* had 9216"):
        kernel.load(WatchedRam(32 * MIB), memory_size=32 * MIB)
    kernel.close()
    initrd.close()


def test_a_file_whose_header_changes_after_it_was_opened(tmp_path: Path) -> None:
    """The header that was checked counts."""
    path = tmp_path / "kernel"
    path.write_bytes(bzimage())
    kernel = open_kernel(path)
    path.write_bytes(bzimage(pref_address=0xFFFFFFFFFFFFFFFF, syssize=0xFFFFFFFF))
    ram = WatchedRam(32 * MIB)
    assert kernel.load(ram, memory_size=32 * MIB).rip == 0x1000200
    assert ram.read(0x1000000, len(CODE)) == CODE
    kernel.close()


@pytest.mark.parametrize("memory", [0, -2 * MIB, 30 * MIB, 33 * MIB, 64 * MIB + 1])
def test_memory_that_is_none(tmp_path: Path, memory: int) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bzimage())
    kernel = open_kernel(path)
    with pytest.raises(UserError, match="memory of"):
        kernel.place(memory_size=memory)
    kernel.close()


def test_command_lines_come_as_they_were_typed(tmp_path: Path) -> None:
    """What is no UTF-8 reaches Python as surrogates."""
    path = tmp_path / "kernel"
    path.write_bytes(bzimage())
    kernel = open_kernel(path)
    assert kernel.place(memory_size=32 * MIB, cmdline="é\udcff").cmdline == b"\xc3\xa9\xff\0"
    kernel.close()


def test_booting_imports_little() -> None:
    """Start-up time: exec to the first instruction of the guest has a budget."""
    script = "import sys, vdev.vmm.boot; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    modules = set(done.stdout.decode().split())
    assert not modules & {"pydantic", "rich", "asyncio", "cffi", "pyroute2", "vdev.config"}
