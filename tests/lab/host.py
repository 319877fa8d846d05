"""What this machine can do, and what it lacks."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

_MACHINE_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "modprobe": "kmod",
    "setpriv": "util-linux",
    "lz4": "lz4",
}
_GUEST_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "fio": "fio",
    "iperf3": "iperf3",
}
# System tools of Debian live in /usr/sbin, which an ordinary user's PATH leaves out.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12


def extend_path() -> None:
    """Let system tools be found by name."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(d for d in _SBIN if d not in path)])


class Kvm(NamedTuple):
    """Whether this machine's KVM can be used, and why (not)."""

    usable: bool
    reason: str


@cache
def usable_kvm() -> Kvm:
    """Whether stock kernels run on this machine's /dev/kvm.

    A KVM of the pvm kind emulates guest kernel code instruction by instruction: a stock kernel
    never finishes booting on it, so such a host counts as one without KVM.
    """
    if Path("/sys/module/kvm_pvm").exists():
        return Kvm(False, "this host's /dev/kvm emulates the code of guest kernels (kvm_pvm)")
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Kvm(False, f"/dev/kvm: {error.strerror}")
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return Kvm(False, f"/dev/kvm: KVM_GET_API_VERSION: {error.strerror}")
    finally:
        os.close(fd)
    if version != _KVM_API_VERSION:
        return Kvm(False, f"/dev/kvm: API version {version}, not {_KVM_API_VERSION}")
    return Kvm(True, "this host's /dev/kvm runs stock kernels")


def accelerator() -> str:
    """``kvm`` where the host's KVM runs stock kernels, else ``tcg``."""
    return "kvm" if usable_kvm().usable else "tcg"


def _missing(tools: Mapping[str, str]) -> str | None:
    extend_path()
    missing = sorted(package for tool, package in tools.items() if not shutil.which(tool))
    if not missing:
        return None
    return f"no guest here: packages missing ({', '.join(missing)}; `make setup` installs them)"


@cache
def lacks_lab() -> str | None:
    """Why the KVM lab cannot be started here, or None."""
    return _missing(_MACHINE_TOOLS)


@cache
def lacks_guest() -> str | None:
    """Why no guest can be started here, or None."""
    missing = _missing({**_MACHINE_TOOLS, **_GUEST_TOOLS})
    if missing:
        return missing
    if os.geteuid() != 0:
        return "no guest here: making its root file system needs root"
    return None


@cache
def lacks_network() -> str | None:
    """Why no tap or bridge can be made here, or None."""
    if os.geteuid() != 0:
        return "no tap or bridge here: needs root (CAP_NET_ADMIN)"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"no tap here: /dev/net/tun: {error.strerror}"
    return None
