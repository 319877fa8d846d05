"""The lab's KVM runs stock kernels: QEMU, which is known to work, boots what the tests boot."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from tests.lab import cpio, host, innermost
from tests.lab.innermost import Bootable, Material
from tests.lab.process import run

_KVM_GET_API_VERSION = 0xAE00
_CMDLINE = "panic=-1 reboot=t mitigations=off"


def test_kvm_is_usable() -> None:
    assert host.usable_kvm().usable, host.usable_kvm().reason
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(fd, _KVM_GET_API_VERSION) == 12
    finally:
        os.close(fd)


def test_the_network_can_be_wired() -> None:
    script = "ip tuntap add t0 mode tap && ip link add b0 type bridge && ip link set t0 master b0"
    subprocess.run(["unshare", "--net", "sh", "-c", script], check=True)


async def _qemu(*arguments: str | Path) -> str:
    output = await run(
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-no-reboot"),
        *("-nodefaults", "-display", "none", *arguments),
    )
    return output.decode(errors="replace").replace("\r", "")


async def _boot(kernel: Path, bootable: Bootable, words: str) -> str:
    return await _qemu(
        *("-M", "microvm,pcie=on", "-serial", "stdio", "-device", "virtio-rng-pci"),
        *("-kernel", kernel, "-initrd", bootable.initrd),
        *("-append", f"{_CMDLINE} console=ttyS0 {words}"),
    )


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["generic", "cloud"])
async def test_the_elf_kernel_boots_to_ready_and_runs_a_script(
    material: Material, flavour: str
) -> None:
    bootable: Bootable = getattr(material, flavour)
    script = innermost.script("uname -r; test -c /dev/hwrng; exit $?")
    said = await _boot(bootable.vmlinux, bootable, f"quiet {script}")
    assert "GUEST READY\n" in said
    assert f"{bootable.release}\nGUEST EXIT 0\n" in said


@pytest.mark.long
@pytest.mark.parametrize("flavour", ["generic", "cloud"])
async def test_the_compressed_kernel_boots(material: Material, flavour: str) -> None:
    bootable: Bootable = getattr(material, flavour)
    said = await _boot(bootable.bzimage, bootable, f"quiet {innermost.script('exit 3')}")
    assert "GUEST READY\nGUEST EXIT 3\n" in said


async def test_scripts_in_the_initrd_run_and_all_comes_by_a_virtio_console(
    material: Material, tmp_path: Path
) -> None:
    """On MMIO, with two CPUs and a disk with a file system."""
    bootable = material.cloud
    disk = tmp_path / "disk"
    await run("mkfs.ext4", "-q", disk, "8M")
    before = b"#!/bin/sh\nmount -t ext4 /dev/vda /mnt && echo kept >/mnt/file\n"
    initrd = cpio.appended(bootable.initrd, {"init.d/10-disk": before}, tmp_path / "initrd")
    said = await _qemu(
        *("-M", "microvm", "-smp", "2", "-device", "virtio-serial-device"),
        *("-chardev", "stdio,id=console", "-device", "virtconsole,chardev=console"),
        *("-drive", f"if=none,id=disk,format=raw,file={disk}"),
        *("-device", "virtio-blk-device,drive=disk"),
        *("-kernel", bootable.vmlinux, "-initrd", initrd),
        *("-append", f"{_CMDLINE} console=hvc0 {innermost.script('cat /mnt/file; nproc')}"),
    )
    assert "GUEST READY\nkept\n2\nGUEST EXIT 0\n" in said
