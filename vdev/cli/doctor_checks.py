"""The checks of ``vdev doctor``: each looks at one thing and leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vdev.units import format_size

MIN_KERNEL = (5, 10)

_IO_URING_SETUP = 425  # the same number on every architecture
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_IO_URING_PARAMS_BYTES = 120
_TUNGETFEATURES = 0x800454CF
_IFF_MULTI_QUEUE = 0x0100
_IFF_VNET_HDR = 0x4000
_CAP_NET_ADMIN = 12
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Finding:
    """What a check found; ``needed_for`` lists what cannot be served without it."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed_for: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """ok, missing (something needs it) or optional."""
        if self.ok:
            return "ok"
        return "missing" if self.needed_for else "optional"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status}


def kernel() -> Finding:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    wanted = ".".join(map(str, MIN_KERNEL))
    return Finding(
        "kernel", numbers >= MIN_KERNEL, release, f"Linux {wanted} or later", ("blk", "net")
    )


def native() -> Finding:
    try:
        from vdev import _native
    except ImportError as error:
        return Finding("libvhost", False, str(error), "pip install . (again)", ("blk", "net"))
    return Finding("libvhost", True, os.path.basename(str(_native.__file__)))


def memfd() -> Finding:
    try:
        os.close(os.memfd_create("vdev-doctor"))
    except OSError as error:
        return Finding("memfd", False, _words(error), "a kernel with CONFIG_MEMFD_CREATE", ("blk",))
    return Finding("memfd", True, "guest memory can be shared (memory-backend-memfd,share=on)")


def io_uring() -> Finding:
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    try:
        os.close(_syscall(_IO_URING_SETUP, 4, params))
    except OSError as error:
        sysctl = _read("/proc/sys/kernel/io_uring_disabled")
        fix = "a kernel with CONFIG_IO_URING, or a seccomp filter that allows it"
        if sysctl not in ("", "0"):
            fix = "sysctl kernel.io_uring_disabled=0"
        return Finding(
            "io_uring", False, f"refused ({_words(error)}): threads are used instead", fix
        )
    return Finding("io_uring", True, "allowed")


def tun() -> Finding:
    name, needed_for = "tun", ("net",)
    try:
        with _opened("/dev/net/tun") as fd:
            answer = fcntl.ioctl(fd, _TUNGETFEATURES, bytes(4))
    except OSError as error:
        fix = "modprobe tun; in a container: --device /dev/net/tun; permission to open it"
        return Finding(name, False, f"/dev/net/tun: {_words(error)}", fix, needed_for)
    features = struct.unpack("I", answer)[0]
    lacks = [
        flag
        for flag, bit in (("IFF_VNET_HDR", _IFF_VNET_HDR), ("IFF_MULTI_QUEUE", _IFF_MULTI_QUEUE))
        if not features & bit
    ]
    if lacks:
        return Finding(name, False, f"without {', '.join(lacks)}", "a newer kernel", needed_for)
    return Finding(name, True, "/dev/net/tun, IFF_VNET_HDR, IFF_MULTI_QUEUE")


def net_admin() -> Finding:
    name = "CAP_NET_ADMIN"
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1:
            return Finding(name, True, "taps, bridges and addresses can be made")
    fix = "run vdev as root, or: setcap cap_net_admin+ep on its Python, or a tap made for you"
    return Finding(name, False, "no permission to make taps and bridges", fix, ("net",))


def links() -> Finding:
    """Bridges and veth, tried in a network namespace that ends with a child process."""
    lacks = [kind for kind in ("bridge", "veth") if not _can_make_link(kind)]
    if not lacks:
        return Finding("bridge, veth", True, "both can be made")
    modules = " ".join(lacks)
    return Finding(
        "bridge, veth",
        False,
        f"cannot be made (or tried) here: {modules}",
        f"modprobe {modules}, or run vdev doctor as root",
    )


def kvm() -> Finding:
    from vdev.vmm.host import kvm_usable

    if reason := kvm_usable():
        fix = "a host with hardware virtualisation; until then machines run on QEMU"
        return Finding("KVM", False, reason, fix)
    kinds = [k for k in ("kvm_intel", "kvm_amd") if os.path.exists(f"/sys/module/{k}")]
    return Finding("KVM", True, f"usable ({', '.join(kinds) or 'built in'})")


def hugepages() -> Finding:
    pools = []
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        total, free = (_read(f"{folder}/{name}_hugepages") for name in ("nr", "free"))
        if total not in ("", "0"):
            pools.append(f"{free} of {total} free of {format_size(size)}")
    if pools:
        return Finding("hugepages", True, ", ".join(pools))
    return Finding("hugepages", False, "none reserved", "sysctl vm.nr_hugepages=512 (1 GiB)")


def memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    enough = soft == resource.RLIM_INFINITY or soft >= 8 << 20
    found = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    return Finding("memlock", enough, found, "ulimit -l 65536, or LimitMEMLOCK= of the service")


def userfaultfd() -> Finding:
    number = _USERFAULTFD.get(platform.machine())
    fix = "sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd"
    with contextlib.suppress(OSError), _opened("/dev/userfaultfd"):
        return Finding("userfaultfd", True, "/dev/userfaultfd")
    if number is None:
        return Finding("userfaultfd", False, f"unknown on {platform.machine()}", fix)
    try:
        os.close(_syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return Finding("userfaultfd", False, f"refused ({_words(error)})", fix)
    return Finding("userfaultfd", True, "allowed")


_SANDBOX_FIXES = {
    "seccomp": "a kernel with CONFIG_SECCOMP_FILTER; vdev run --no-sandbox goes without",
    "Landlock": "a kernel with CONFIG_SECURITY_LANDLOCK and landlock among lsm=",
    "namespaces": "sysctl user.max_user_namespaces=10000, or vdev run as root",
    "another user": "vdev run as root, which becomes a user that nobody else is",
}


def _sandbox_part(name: str) -> Callable[[], Finding]:
    """A part of the sandbox of ``vdev run``."""

    def check() -> Finding:
        try:
            from vdev.vmm.sandbox import host_support
        except ImportError as error:
            return Finding(f"sandbox: {name}", False, str(error), "pip install . (again)")
        part = next(part for part in host_support() if part.name == name)
        return Finding(f"sandbox: {name}", part.ok, part.found, _SANDBOX_FIXES[name])

    return check


def _program(name: str, source: str) -> Callable[[], Finding]:
    def check() -> Finding:
        path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        return Finding(name, path is not None, path or "not found", source)

    return check


CHECKS: tuple[Callable[[], Finding], ...] = (
    kernel,
    native,
    memfd,
    io_uring,
    tun,
    net_admin,
    links,
    kvm,
    hugepages,
    memlock,
    userfaultfd,
    *map(_sandbox_part, _SANDBOX_FIXES),
    _program("qemu-system-x86_64", "apt install qemu-system-x86"),
    _program("cloud-hypervisor", "its releases on GitHub; Debian has none"),
    _program("fio", "apt install fio"),
    _program("iperf3", "apt install iperf3"),
)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _syscall(number: int, *arguments: Any) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _can_make_link(kind: str) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            _enter_namespace()
            _make_link(kind)
            code = 0
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _enter_namespace() -> None:
    flags = _CLONE_NEWNET | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)
    if ctypes.CDLL(None, use_errno=True).unshare(flags) < 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _make_link(kind: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        peer = {"peer": "vdev-doctor1"} if kind == "veth" else {}
        route.link("add", ifname="vdev-doctor0", kind=kind, **peer)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _words(error: OSError) -> str:
    return error.strerror or str(error)
