"""Whether this host can run a machine: looked at before anything is touched."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vdev.errors import UserError
from vdev.units import format_size
from vdev.vmm.config import MachineConfig

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12
_HUGE_PAGE = 2 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
# bzImage: the boot flag, and "HdrS" of the boot protocol (Documentation/arch/x86/boot.rst).
_BOOT_FLAG_OFFSET, _BOOT_FLAG = 0x1FE, b"\x55\xaa"
_HEADER_OFFSET, _HEADER = 0x202, b"HdrS"
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_EM_X86_64 = b"\x3e\x00"


def kvm_usable() -> str | None:
    """None where machines run on this host's KVM, else why they do not, in one line."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return "/dev/kvm: no rights to open it: join the group kvm, or run as root"
    except OSError as error:
        return f"/dev/kvm: {error.strerror}: load kvm-intel or kvm-amd; in a VM: nested KVM"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm: it is no KVM ({error.strerror})"
    finally:
        os.close(fd)
    if version != _KVM_API_VERSION:
        return f"/dev/kvm: API version {version}, but {_KVM_API_VERSION} is needed"
    if os.path.exists("/sys/module/kvm_pvm"):
        return (
            "/dev/kvm: its kind (kvm_pvm) emulates guest kernel code, on which stock kernels do "
            "not finish booting"
        )
    return None


def check_host(config: MachineConfig) -> None:
    """Raises UserError where the configuration names what this host does not have."""
    check_kernel(config.kernel)
    if config.initrd is not None:
        _readable("initrd", config.initrd)
    for share in config.shares:
        if not os.path.isdir(share.directory):
            raise UserError(f"share {share.directory}: no such folder")
    _check_memory(config)


def check_kernel(path: str) -> None:
    """Raises UserError unless the file looks like a kernel: a bzImage or an x86-64 ELF."""
    start = _readable("kernel", path, 0x210)
    if start[:6] == _ELF64_LITTLE and start[18:20] == _EM_X86_64:
        return
    if (
        start[_BOOT_FLAG_OFFSET : _BOOT_FLAG_OFFSET + 2] == _BOOT_FLAG
        and start[_HEADER_OFFSET : _HEADER_OFFSET + 4] == _HEADER
    ):
        return
    raise UserError(f"kernel {path}: neither a bzImage nor an x86-64 ELF kernel")


def _readable(what: str, path: str, size: int = 1) -> bytes:
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise UserError(f"{what} {path}: not a regular file")
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None


def _check_memory(config: MachineConfig) -> None:
    present = memory_total()
    if config.memory > present:
        raise UserError(f"memory of {config.memory >> 20} MiB: this host has {present >> 20} MiB")
    if config.hugepages:
        free = huge_pages_free() * _HUGE_PAGE
        if config.memory > free:
            raise UserError(
                f"memory of {format_size(config.memory)} in hugepages: {format_size(free)} are "
                f"free: sysctl vm.nr_hugepages={config.memory // _HUGE_PAGE} makes some"
            )


def memory_total() -> int:
    """The host's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def huge_pages_free() -> int:
    """Huge pages of 2 MiB that nobody has, nor has reserved."""
    files = (_HUGE_PAGES / f"{name}_hugepages" for name in ("free", "resv"))
    try:
        free, reserved = (int(file.read_text()) for file in files)
    except (OSError, ValueError):
        return 0
    return free - reserved
