"""What this machine can do, and what it lacks."""

from __future__ import annotations

import fcntl
import os
import shutil
from functools import cache
from pathlib import Path

_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "fio": "fio",
    "iperf3": "iperf3",
    "setpriv": "util-linux",
}
# System tools of Debian live in /usr/sbin, which an ordinary user's PATH leaves out.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_KVM_GET_API_VERSION = 0xAE00


def extend_path() -> None:
    """Let system tools be found by name."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(d for d in _SBIN if d not in path)])


@cache
def accelerator() -> str:
    """``kvm`` where the host's KVM runs stock kernels, else ``tcg``.

    A KVM of the pvm kind emulates guest kernel code instruction by instruction: a stock kernel
    never finishes booting on it, so such a host counts as one without KVM.
    """
    if Path("/sys/module/kvm_pvm").exists():
        return "tcg"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "tcg"
    try:
        return "kvm" if fcntl.ioctl(fd, _KVM_GET_API_VERSION) == 12 else "tcg"
    except OSError:
        return "tcg"
    finally:
        os.close(fd)


@cache
def lacks_guest() -> str | None:
    """Why no guest can be started here, or None."""
    extend_path()
    missing = sorted(package for tool, package in _TOOLS.items() if not shutil.which(tool))
    if missing:
        return f"no guest here: packages missing ({', '.join(missing)}; `make setup` installs them)"
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
