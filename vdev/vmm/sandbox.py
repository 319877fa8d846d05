"""The sandbox: what a process gives up before its guest may speak.

Theory of operation.  A guest that breaks out of its machine has what its process has.  So the
process opens all it needs, then gives the rest up, in an order in which no step takes away what a
later one needs: namespaces, an own root, Landlock, the user with all capabilities, and at last the
system calls.  Linux keeps most of this for each thread and hands it on to those that a thread
starts; therefore `Sandbox.enter` insists on being called by the only thread.  Threads of the
library that start later narrow their filters down to their class by themselves.

What a kernel does not have is left out and named in the report; what it has but refuses is an
error where going on would mean to keep more than was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vdev._native import ffi, lib
from vdev.errors import UserError
from vdev.record import Record

EXIT_CODE: int = lib.SANDBOX_EXIT_CODE
"""How a process ends that made a forbidden system call."""

FAMILIES = {
    "unix": socket.AF_UNIX,
    "inet": socket.AF_INET,
    "inet6": socket.AF_INET6,
    "netlink": socket.AF_NETLINK,
    "vsock": socket.AF_VSOCK,
}
FREE_UIDS = range(61184, 65520)
"""Users without a name, as systemd takes them for its dynamic users."""

_NAMESPACES = {"mount": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000}
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_WORKER_FLAGS = 0x4010  # PF_USER_WORKER, PF_IO_WORKER (include/linux/sched.h)


class KeptPath(NamedTuple):
    """A file, or a directory with all beneath it, that can be opened within the sandbox."""

    path: str | os.PathLike[str]
    writable: bool = False


class SandboxOptions(Record):
    """What to give up.  Raises UserError for a user or a family that does not exist.

    user: a name, "UID" or "UID:GID" to become if started by root; None is a user without a name
    that nobody else is.  io_uring: whether iothreads that start later may set up rings.
    own_network: leave the host's network (what is open, as taps, stays usable).
    families: names of FAMILIES, of which sockets may be made.  open_files: the most at once.
    """

    user: str | None = None
    namespaces: bool = True
    own_network: bool = False
    own_root: bool = True
    landlock: bool = True
    seccomp: bool = True
    io_uring: bool = True
    families: tuple[str, ...] = ("unix",)
    open_files: int = 4096

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise UserError(f"socket family {family!r} does not exist: {', '.join(FAMILIES)}")
        if self.open_files < 64:
            raise UserError(f"{self.open_files} open files: at least 64 are needed")
        if self.user is not None:
            user_ids(self.user)


class SandboxReport(NamedTuple):
    """What is in force; `degraded` has a line for each part that the host could not give."""

    user: str
    namespaces: tuple[str, ...]
    own_root: bool
    landlock: int
    seccomp: bool
    families: tuple[str, ...]
    kept: tuple[str, ...]
    degraded: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and `info`."""
        return self._asdict()


class Support(NamedTuple):
    """Whether the host has a part of the sandbox, for ``vdev doctor``."""

    name: str
    ok: bool
    found: str


class Sandbox:
    """The sandbox of this process: `enter` once, then `report`."""

    def __init__(self, config: SandboxOptions | None = None) -> None:
        self._config = config or SandboxOptions()
        self._degraded: list[str] = []
        self._namespaces: list[str] = []
        self._report: SandboxReport | None = None

    def enter(self, keep_paths: Iterable[KeptPath] = ()) -> SandboxReport:
        """Gives up what the configuration says; only `keep_paths` can be opened from then on.

        Nothing that needs root, another path, a child process or a new extension module works
        afterwards.  Raises UserError where a path does not exist or the host refuses a part
        that cannot be done without, RuntimeError if this process has other threads.  After an
        error some parts are given up already: the process should end.
        """
        if self._report is not None or lib.sandbox_is_sealed():
            raise RuntimeError("this process is in its sandbox already")
        if threads := other_threads():
            raise RuntimeError(f"the sandbox would not hold for running threads: {threads}")
        config = self._config
        paths = _resolve(keep_paths)
        user = self._new_user()
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, config.open_files)
        native, alive = _native_paths(paths)
        self._unshare(user)
        own_root = self._new_root(native, paths)
        landlock = self._restrict_files(native, len(paths))
        del alive
        self._drop(user)
        if config.seccomp:
            self._seal()
        else:
            self._degraded.append("seccomp: not asked for")
        self._report = SandboxReport(
            user=f"{os.getuid()}:{os.getgid()}",
            namespaces=tuple(self._namespaces),
            own_root=own_root,
            landlock=landlock,
            seccomp=config.seccomp,
            families=config.families if config.seccomp else tuple(FAMILIES),
            kept=tuple(f"{path}{' (writable)' if writable else ''}" for path, writable in paths),
            degraded=tuple(self._degraded),
        )
        return self._report

    def report(self) -> SandboxReport | None:
        """What is in force; None before `enter`."""
        return self._report

    def _new_user(self) -> tuple[int, int] | None:
        if os.geteuid() != 0:
            if self._config.user is not None and user_ids(self._config.user)[0] != os.geteuid():
                raise UserError(f"user {self._config.user}: only root can become another user")
            return None
        if self._config.user is None:
            uid = free_uid()
            return uid, uid
        return user_ids(self._config.user)

    def _unshare(self, user: tuple[int, int] | None) -> None:
        config = self._config
        if not config.namespaces and not config.own_network:
            self._degraded.append("namespaces: not asked for")
            return
        wanted = dict(_NAMESPACES) if config.namespaces else {}
        if config.own_network:
            wanted["network"] = _NEWNET
        if user is None and not self._own_users():
            wanted = {"network": _NEWNET} if config.own_network else {}
        for name, flag in wanted.items():
            result = lib.sandbox_unshare(flag)
            if result == 0:
                self._namespaces.append(name)
            elif name == "network":
                raise UserError(f"own network: {os.strerror(-result)}; it needs root")
            else:
                self._degraded.append(f"{name} namespace: {os.strerror(-result)}")

    def _own_users(self) -> bool:
        """Without root, a user namespace gives the right to the others."""
        uid, gid = os.geteuid(), os.getegid()
        reason = ""
        if not os.access("/proc/self/uid_map", os.W_OK):
            reason = "/proc/self belongs to another user"
        elif (result := lib.sandbox_unshare(_NEWUSER)) < 0:
            reason = os.strerror(-result)
        if reason:
            self._degraded.append(f"namespaces without root: {reason}")
            return False
        self._namespaces.append("user")
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        except OSError as error:
            self._degraded.append(f"names of users in the user namespace: {error.strerror}")
        return True

    def _new_root(self, native: Any, paths: list[tuple[str, bool]]) -> bool:
        reason = ""
        if not self._config.own_root:
            reason = "not asked for"
        elif "mount" not in self._namespaces:
            reason = "it needs a mount namespace"
        elif any(path == "/" for path, _ in paths):
            reason = "/ is kept"
        elif (result := lib.sandbox_new_root(native, len(paths))) < 0:
            reason = os.strerror(-result)
        if reason:
            self._degraded.append(f"own root: {reason}")
        return not reason

    def _restrict_files(self, native: Any, count: int) -> int:
        if not self._config.landlock:
            self._degraded.append("Landlock: not asked for")
            return 0
        tcp = bool({"inet", "inet6"} & set(self._config.families))
        abi: int = lib.sandbox_landlock(native, count, tcp)
        if abi in (-errno.ENOSYS, -errno.EOPNOTSUPP):
            self._degraded.append("Landlock: this kernel has none, or it is off")
            return 0
        if abi < 0:
            raise UserError(f"Landlock: {os.strerror(-abi)}")
        lacks = {3: "truncation", 4: "TCP", 5: "ioctl", 6: "signals and abstract sockets"}
        for since, what in lacks.items():
            if abi < since:
                self._degraded.append(f"Landlock: {what} not covered (ABI {abi}, not {since})")
        return abi

    def _drop(self, user: tuple[int, int] | None) -> None:
        uid, gid = user or (-1, -1)
        result = lib.sandbox_drop(uid, gid)
        if result < 0:
            raise UserError(
                f"becoming user {uid}:{gid} without capabilities: {os.strerror(-result)}; "
                "root needs CAP_SETUID and CAP_SETGID for it"
            )

    def _seal(self) -> None:
        config = self._config
        native = ffi.new("struct sandbox_config *")
        native.flags = 0 if config.io_uring else lib.SANDBOX_NO_NEW_IO_URING
        native.num_families = len(config.families)
        native.family[0 : len(config.families)] = [int(FAMILIES[name]) for name in config.families]
        result = lib.sandbox_seal(native) or lib.sandbox_enter(lib.SANDBOX_CONTROL)
        if result < 0:
            raise UserError(f"seccomp filters: {os.strerror(-result)}: does this kernel have them?")


def python_paths() -> tuple[KeptPath, ...]:
    """Where this Python imports from: to be kept where modules are imported later on.

    Extension modules must be imported before, since nothing may be mapped to be executed."""
    return tuple(KeptPath(path) for path in dict.fromkeys(sys.path) if os.path.isdir(path))


def user_ids(user: str) -> tuple[int, int]:
    """The uid and gid of a name, "UID" or "UID:GID".  Raises UserError if it is none, or root."""
    import pwd

    name, _, group = user.partition(":")
    try:
        if name.isdecimal():
            ids = int(name), int(group) if group else int(name)
        else:
            entry = pwd.getpwnam(name)
            ids = entry.pw_uid, int(group) if group else entry.pw_gid
    except (KeyError, ValueError):
        raise UserError(f"user {user!r} does not exist: a name, UID or UID:GID") from None
    if 0 in ids or max(ids) >= (1 << 32) - 1:
        raise UserError(f"user {user!r}: an unprivileged one is needed")
    return ids


def free_uid() -> int:
    """A user that has no name and no process."""
    import pwd

    first = int.from_bytes(os.urandom(8), "little") % len(FREE_UIDS)
    for at in range(first, first + len(FREE_UIDS)):
        uid = FREE_UIDS[at % len(FREE_UIDS)]
        try:
            pwd.getpwuid(uid)
        except KeyError:
            try:
                os.getpriority(os.PRIO_USER, uid)  # of all its processes, if it has any
            except ProcessLookupError:
                return uid
    raise UserError(f"every user from {FREE_UIDS.start} to {FREE_UIDS[-1]} is taken: name one")


def other_threads() -> list[str]:
    """The names of this process's threads besides the calling one and the kernel's workers."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name, _, rest = (task / "stat").read_text().partition(" (")[2].rpartition(") ")
            if not int(rest.split()[6]) & _WORKER_FLAGS and int(task.name) != _gettid():
                names.append(name)
    return names


def host_support() -> tuple[Support, ...]:
    """What this host has of the parts of a sandbox."""
    abi = lib.sandbox_landlock_abi()
    actions = _read("/proc/sys/kernel/seccomp/actions_avail").split()
    root = os.geteuid() == 0
    users = root or _read("/proc/sys/user/max_user_namespaces") not in ("", "0")
    return (
        Support("seccomp", "trap" in actions, ", ".join(actions) or "no filters in this kernel"),
        Support("Landlock", abi > 0, f"ABI {abi}" if abi > 0 else os.strerror(-abi)),
        Support("namespaces", users, "as root" if root else "user namespaces" if users else "none"),
        Support("another user", root, "dynamic" if root else f"stays {os.geteuid()}: not root"),
    )


def _gettid() -> int:
    import threading

    return threading.get_native_id()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(which, (most, most))


def _resolve(keep: Iterable[KeptPath]) -> list[tuple[str, bool]]:
    """Paths without symbolic links, and also as they were given, parents first."""
    paths: dict[str, bool] = {}
    for kept in keep:
        given = os.path.abspath(os.fspath(kept.path))
        if not os.path.exists(given):
            raise UserError(f"{given} is to be kept for the sandbox, but does not exist")
        for path in (given, os.path.realpath(given)):
            paths[path] = paths.get(path, False) or kept.writable
    return sorted(paths.items(), key=lambda item: item[0].count("/") if item[0] != "/" else 0)


def _native_paths(paths: list[tuple[str, bool]]) -> tuple[Any, list[Any]]:
    alive = [ffi.new("char[]", os.fsencode(path)) for path, _ in paths]
    native = ffi.new("struct sandbox_path[]", len(paths))
    for at, (_, writable) in enumerate(paths):
        native[at].path = alive[at]
        native[at].writable = writable
    return native, alive
