"""A machine's control group (cgroup v2): how much of the host it may take.

A machine's group is `vdev-NAME` under a parent: by default the group that its process is in.  It is
made and joined under a lock on the parent, so a group without a process belongs to a machine that
ended; the next start of that name, or `remove_leftovers`, takes it away.  A process cannot remove
the group that it is in.

A group with processes of its own hands no controllers on (unless it is the root), so where the
parent is our own group we move down first.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from vdev.errors import UserError
from vdev.record import Record

PREFIX = "vdev-"
PERIOD_US = 100_000
IO_KEYS = ("rbps", "wbps", "riops", "wiops")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class CgroupLimits(Record):
    """What to limit; None is no limit.  Raises UserError for a value out of its range.

    cpus: CPU time, in CPUs.  memory: bytes, of the guest and of us together.  pids: processes and
    threads.  cpu_weight, io_weight: 1 to 10000, everybody has 100.  cpuset: a list like "0-3,8".
    io: for each disk (a block device, or a file or directory on one) bytes and requests per second
    by the names of IO_KEYS; without any disk, the group can be given such limits later.
    """

    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None
    cpu_weight: int | None = None
    io_weight: int | None = None
    cpuset: str | None = None
    io: Mapping[str, Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0.01 <= self.cpus <= 1e6:
            raise UserError(f"limit of {self.cpus} CPUs: at least 0.01")
        for name, value in (("memory", self.memory), ("pids", self.pids)):
            if value is not None and value < 1:
                raise UserError(f"limit {name} = {value}: at least 1")
        for name, value in (("cpu_weight", self.cpu_weight), ("io_weight", self.io_weight)):
            if value is not None and not 1 <= value <= 10000:
                raise UserError(f"{name} = {value}: 1 to 10000")
        if self.cpuset is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", self.cpuset):
            raise UserError(f'cpuset {self.cpuset!r}: a list of CPUs like "0-3,8"')
        for disk, limits in (self.io or {}).items():
            for key, value in limits.items():
                if key not in IO_KEYS or value < 1:
                    raise UserError(
                        f"I/O limit {key} = {value} of {disk}: one of {', '.join(IO_KEYS)}, "
                        "at least 1"
                    )

    def settings(self) -> list[tuple[str, str]]:
        """The files of a group and what to write into them, in order."""
        values: list[tuple[str, str]] = []
        if self.cpuset is not None:
            values.append(("cpuset.cpus", self.cpuset))
        if self.cpus is not None:
            values.append(("cpu.max", f"{round(self.cpus * PERIOD_US)} {PERIOD_US}"))
        if self.cpu_weight is not None:
            values.append(("cpu.weight", str(self.cpu_weight)))
        if self.memory is not None:
            values.append(("memory.max", str(self.memory)))
        if self.pids is not None:
            values.append(("pids.max", str(self.pids)))
        if self.io_weight is not None:
            values.append(("io.weight", f"default {self.io_weight}"))
        for disk, limits in (self.io or {}).items():
            words = " ".join(f"{key}={value}" for key, value in limits.items())
            values.append(("io.max", f"{device_number(disk)} {words}"))
        return values

    def controllers(self) -> list[str]:
        """Those that the group needs."""
        wanted = dict.fromkeys(name.partition(".")[0] for name, _ in self.settings())
        return list(wanted if self.io is None else wanted | {"io": None})


class Cgroup:
    """A group that exists; `enter` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def enter(
        cls, name: str, limits: CgroupLimits | None = None, parent: Path | None = None
    ) -> Cgroup:
        """Makes the group of the machine `name`, sets its limits, and moves this process into it.

        Raises UserError, and leaves everything as it was, where the name is none or is in use, a
        controller for a limit that was asked for is not to be had, or the host refuses.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"machine name {name!r}: letters, digits, '_', '.' and '-', at most 200"
            )
        parent = own_group() if parent is None else parent
        limits = limits or CgroupLimits()
        settings, controllers = limits.settings(), limits.controllers()
        group = cls(parent / f"{PREFIX}{name}")
        try:
            with _locked(parent):
                group._make()
                try:
                    group._fill(settings, controllers)
                except BaseException:
                    with contextlib.suppress(OSError):
                        group.path.rmdir()
                    raise
        except OSError as error:
            raise UserError(f"cgroup {group.path}: {error.strerror or error}") from None
        return group

    def processes(self) -> list[int]:
        """The ids of the processes in it."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def add(self, pid: int) -> None:
        """Moves a process of the machine, as a back-end's, into it.  Raises OSError."""
        _write(self.path / "cgroup.procs", str(pid))

    def remove(self) -> bool:
        """Takes the group away once no process is in it; whether it is gone."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            raise
        return True

    def _make(self) -> None:
        if self.path.is_dir() and not self.remove():
            pids = ", ".join(map(str, self.processes())) or "of groups beneath it"
            raise UserError(
                f"cgroup {self.path} is in use (process {pids}): is that machine running?"
            )
        self.path.mkdir()

    def _fill(self, settings: list[tuple[str, str]], controllers: list[str]) -> None:
        parent = self.path.parent
        before = own_group() if controllers and _is_kernels(parent) else None
        _check_available(parent, controllers)
        handed_on: list[str] = []
        try:
            handed_on = self._hand_on(controllers)
            for name, value in settings:
                try:
                    _write(self.path / name, value)
                except OSError as error:
                    raise UserError(
                        f"{name} = {value} in cgroup {self.path}: {error.strerror}"
                    ) from None
            self.add(os.getpid())
        except BaseException:
            # A group that hands on controllers takes no process back.
            self._take_back(handed_on)
            if before is not None:
                with contextlib.suppress(OSError):
                    _write(before / "cgroup.procs", str(os.getpid()))
            raise

    def _hand_on(self, controllers: list[str]) -> list[str]:
        """Has the parent hand on what it does not yet; returns what that was."""
        parent = self.path.parent
        switches = parent / "cgroup.subtree_control"
        missing = [name for name in controllers if name not in switches.read_text().split()]
        # Only the root may keep processes. Elsewhere Linux refuses domain controllers then, and
        # with threaded ones (cpu, pids) makes the groups beneath invalid.
        if missing and (parent / "cgroup.type").exists():
            if os.getpid() in Cgroup(parent).processes():
                self.add(os.getpid())
            if Cgroup(parent).processes():
                raise UserError(
                    f"cgroup {parent} has other processes, so it hands on no {', '.join(missing)} "
                    "controller: give a parent cgroup without any"
                )
        for at, name in enumerate(missing):
            try:
                _write(switches, f"+{name}")
            except OSError:
                self._take_back(missing[:at])
                raise
        return missing

    def _take_back(self, controllers: list[str]) -> None:
        for name in controllers:
            with contextlib.suppress(OSError):
                _write(self.path.parent / "cgroup.subtree_control", f"-{name}")


def mount_point() -> Path | None:
    """Where cgroup v2 is mounted, if it is."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    return None


def own_group() -> Path:
    """The group of this process.  Raises UserError where the host has no cgroup v2."""
    mounted = mount_point()
    if mounted is not None:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return mounted / line[3:].removesuffix(" (deleted)").lstrip("/")
    raise UserError("this host has no cgroup v2 (/sys/fs/cgroup): start without limits")


def available_controllers(group: Path) -> list[str]:
    """The controllers that groups beneath this one can have."""
    try:
        return (group / "cgroup.controllers").read_text().split()
    except OSError as error:
        raise UserError(f"{group} is no cgroup v2: {error.strerror}") from None


def remove_leftovers(parent: Path) -> list[str]:
    """Removes the groups of machines that ended; returns their machines' names."""
    with _locked(parent):
        groups = sorted(path for path in parent.glob(f"{PREFIX}*") if path.is_dir())
        return [path.name.removeprefix(PREFIX) for path in groups if Cgroup(path).remove()]


def device_number(path: str) -> str:
    """MAJOR:MINOR of the disk that is, or holds, `path`.  Raises UserError if there is none."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"I/O limit of {path}: {error.strerror}") from None
    number = found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    device = Path("/sys/dev/block", name)
    if not device.exists():
        raise UserError(f"I/O limit of {path}: it lies on no block device")
    if (device / "partition").exists():
        return (device.resolve().parent / "dev").read_text().strip()
    return name


def _check_available(parent: Path, wanted: list[str]) -> None:
    offered = available_controllers(parent)
    for controller in wanted:
        if controller not in offered:
            raise UserError(
                f"a {controller} limit was asked for, but cgroup {parent} has no {controller} "
                f"controller (it has: {', '.join(offered) or 'none'}; is it with cgroup v1, or not "
                "delegated?)"
            )


def _is_kernels(group: Path) -> bool:
    mounted = mount_point()
    return mounted is not None and group.is_relative_to(mounted)


def _write(path: Path, value: str) -> None:
    # One write, unbuffered: each is a command of its own, which may be refused.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(parent: Path) -> Iterator[None]:
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
