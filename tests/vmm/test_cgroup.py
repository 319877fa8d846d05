"""Control groups of machines, in the host's real cgroup v2, by processes that join them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vdev.errors import UserError
from vdev.vmm.cgroup import (
    Cgroup,
    CgroupLimits,
    available_controllers,
    device_number,
    mount_point,
    own_group,
    remove_leftovers,
)
from vdev.vmm.io_limit import IoLimit

# Joins a group, says what came of it, acts when told to, and ends when its stdin does.
JOIN = """
import json, os, sys
from pathlib import Path
from vdev.errors import UserError
from vdev.vmm.cgroup import Cgroup, CgroupLimits, own_group

name, limits, parent, act, settings, start = json.loads(sys.argv[1])

class Limits(CgroupLimits):
    def settings(self):
        return settings or super().settings()

if start:
    Path(start, "cgroup.procs").write_text(str(os.getpid()))
try:
    group = Cgroup.enter(name, Limits(**limits), Path(parent) if parent else None)
    print(json.dumps({"path": str(group.path), "own": str(own_group())}), flush=True)
except UserError as error:
    print(json.dumps({"error": str(error), "own": str(own_group())}), flush=True)
    sys.exit(2)
if act == "fork":
    try:
        children = [os.fork() for _ in range(1)]
    except BlockingIOError:
        print("refused", flush=True)
    else:
        if 0 in children:
            os._exit(0)
        print("forked", flush=True)
sys.stdin.read()
"""


class Machine:
    """A process that joined, or tried to."""

    def __init__(
        self,
        name: str,
        parent: Path | None,
        limits: dict[str, Any] | None = None,
        act: str = "",
        settings: Sequence[tuple[str, str]] = (),
        start: Path | None = None,
    ) -> None:
        """settings: what the limits come to, if not by themselves.  start: the group to be in."""
        paths = [str(path) if path else None for path in (parent, start)]
        words = json.dumps([name, limits or {}, paths[0], act, settings, paths[1]])
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOIN, words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said: dict[str, str] = json.loads(self.process.stdout.readline())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def parent() -> Iterator[Path]:
    """A group of the test's own, at the top, without processes."""
    mounted = mount_point()
    assert mounted is not None, "mount -t cgroup2 none /sys/fs/cgroup"
    group = mounted / f"test-{os.getpid()}"
    group.mkdir()
    # As a service manager does for a service that is delegated all.
    switches = mounted / "cgroup.subtree_control"
    off = set(available_controllers(mounted)) - set(switches.read_text().split())
    for controller in off:
        with contextlib.suppress(OSError):
            switches.write_text(f"+{controller}")
    yield group
    remove_leftovers(group)
    group.rmdir()
    for controller in off:
        with contextlib.suppress(OSError):
            switches.write_text(f"-{controller}")


@pytest.fixture
def without() -> str:
    """The name of a controller that this host's cgroup v2 has not, as hybrid hosts lack most."""
    mounted = mount_point()
    assert mounted is not None
    return next(
        (c for c in ("memory", "pids", "cpu") if c not in available_controllers(mounted)), ""
    )


def test_a_process_joins_a_group_of_its_own(parent: Path) -> None:
    with Machine("vm1", parent) as machine:
        group = Cgroup(parent / "vdev-vm1")
        assert machine.said == {"path": str(group.path), "own": str(group.path)}
        assert group.processes() == [machine.process.pid]
        assert not group.remove(), "a group that is in use stays"
        assert remove_leftovers(parent) == []
    assert remove_leftovers(parent) == ["vm1"]
    assert not group.path.exists()


def test_the_default_parent_is_the_present_group() -> None:
    here = own_group()
    with Machine("default-parent", None) as machine:
        assert machine.said["path"] == str(here / "vdev-default-parent")
    assert Cgroup(here / "vdev-default-parent").remove()


def test_a_back_end_can_be_moved_in(parent: Path) -> None:
    with Machine("vm1", parent), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as back_end:
        group = Cgroup(parent / "vdev-vm1")
        group.add(back_end.pid)
        assert back_end.pid in group.processes()
        back_end.communicate()


def test_a_killed_machine_leaves_nothing_that_its_next_start_trips_over(parent: Path) -> None:
    Machine("vm1", parent).kill()
    assert (parent / "vdev-vm1").is_dir()
    with Machine("vm1", parent) as again:
        assert "error" not in again.said


def test_a_running_machine_keeps_its_group(parent: Path) -> None:
    with Machine("vm1", parent) as first, Machine("vm1", parent) as second:
        assert second.said["error"].startswith(f"cgroup {parent}/vdev-vm1 is in use")
        assert str(first.process.pid) in second.said["error"]
        assert second.process.wait() == 2
        assert Cgroup(parent / "vdev-vm1").processes() == [first.process.pid]


def test_two_starts_at_once_get_one_group(parent: Path) -> None:
    """The lock: one joins, the others are told."""
    machines = [Machine("vm1", parent) for _ in range(4)]
    try:
        assert sum("error" not in machine.said for machine in machines) == 1
    finally:
        for machine in machines:
            machine.kill()


def test_leftovers_are_machines_groups_only(parent: Path) -> None:
    other = parent / "somebody"
    other.mkdir()
    Machine("a", parent).kill()
    with Machine("b", parent):
        assert remove_leftovers(parent) == ["a"]
        assert other.is_dir()
    other.rmdir()


def test_a_limit_without_its_controller_is_refused_and_leaves_nothing(
    parent: Path, without: str
) -> None:
    """On hosts that have them all, a group that hands nothing on plays the host that has not."""
    top = parent
    if not without:
        top, without = parent / "inner" / "leaf", "pids"
        top.mkdir(parents=True)
    limits: dict[str, dict[str, Any]] = {
        "memory": {"memory": 1 << 30},
        "pids": {"pids": 9},
        "cpu": {"cpus": 1},
    }
    before = own_group()
    with Machine("vm1", top, limits[without]) as machine:
        assert f"a {without} limit was asked for" in machine.said["error"]
        assert f"has no {without} controller" in machine.said["error"]
        assert machine.said["own"] == str(before)
    assert not (top / "vdev-vm1").exists()
    if top != parent:
        top.rmdir()
        top.parent.rmdir()


def test_limits_are_in_force(parent: Path) -> None:
    """Where the host's cgroup v2 has the controllers: the kernel says what it took, and acts."""
    mine = available_controllers(parent)
    wanted: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "cpu": ({"cpus": 1.5, "cpu_weight": 50}, {"cpu.max": "150000 100000", "cpu.weight": "50"}),
        "memory": ({"memory": 256 << 20}, {"memory.max": str(256 << 20)}),
        "pids": ({"pids": 1}, {"pids.max": "1"}),
    }
    limits: dict[str, Any] = {}
    files: dict[str, str] = {}
    for controller in wanted:
        if controller in mine:
            limits.update(wanted[controller][0])
            files.update(wanted[controller][1])
    with Machine("vm1", parent, limits, act="fork") as machine:
        assert machine.line() == ("refused" if "pids" in mine else "forked")
        for name, value in files.items():
            assert (parent / "vdev-vm1" / name).read_text().strip() == value


def some_limit(parent: Path) -> tuple[str, str]:
    """A limit that this host has for sure, with a value that limits nothing."""
    files = {"pids": "pids.max", "memory": "memory.max", "hugetlb": "hugetlb.2MB.max"}
    mine = available_controllers(parent)
    return next(name for controller, name in files.items() if controller in mine), "max"


def test_a_group_of_our_own_hands_on_once_we_moved_down(parent: Path) -> None:
    limit = some_limit(parent)
    with Machine("vm1", None, settings=[limit], start=parent) as machine:
        assert machine.said.get("path") == str(parent / "vdev-vm1"), machine.said
        assert (parent / "vdev-vm1" / limit[0]).read_text().strip() == "max"
        assert (parent / "cgroup.procs").read_text() == ""


def test_a_group_with_other_processes_hands_nothing_on(parent: Path) -> None:
    limit = some_limit(parent)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        (parent / "cgroup.procs").write_text(str(other.pid))
        with Machine("vm1", None, settings=[limit], start=parent) as machine:
            assert "has other processes" in machine.said["error"]
            assert machine.said["own"] == str(parent), "it is where it was"
        other.communicate()
    assert not (parent / "vdev-vm1").exists()


def test_a_value_that_the_kernel_refuses_is_undone(parent: Path) -> None:
    name, _ = some_limit(parent)
    with Machine("vm1", None, settings=[(name, "nonsense")], start=parent) as machine:
        assert f"{name} = nonsense in cgroup" in machine.said["error"]
        assert machine.said["own"] == str(parent)
    assert not (parent / "vdev-vm1").exists()
    assert (parent / "cgroup.subtree_control").read_text().split() == []


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The number and the path of a whole block device."""
    (tmp_path / "disk").write_bytes(bytes(1 << 16))
    made = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "disk"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    path = made.stdout.strip()
    found = os.stat(path).st_rdev
    yield f"{os.major(found)}:{os.minor(found)}", path
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A directory that looks like a group which can hand on everything."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpuset cpu io memory pids\n")
    return tmp_path


def test_what_is_written_for_each_limit(block_device: tuple[str, str]) -> None:
    number, node = block_device
    limits = CgroupLimits(
        cpus=2.5,
        memory=1 << 30,
        pids=64,
        cpu_weight=200,
        io_weight=300,
        cpuset="0-1,3",
        io={node: {"rbps": 1000000, "wiops": 500}},
    )
    assert limits.settings() == [
        ("cpuset.cpus", "0-1,3"),
        ("cpu.max", "250000 100000"),
        ("cpu.weight", "200"),
        ("memory.max", "1073741824"),
        ("pids.max", "64"),
        ("io.weight", "default 300"),
        ("io.max", f"{number} rbps=1000000 wiops=500"),
    ]
    assert limits.controllers() == ["cpuset", "cpu", "memory", "pids", "io"]
    assert CgroupLimits().settings() == []
    assert CgroupLimits().controllers() == []
    # Limits of disks that are not there yet.
    assert CgroupLimits(io={}).settings() == []
    assert CgroupLimits(io={}).controllers() == ["io"]


def test_a_disk_that_comes_later_is_limited(block_device: tuple[str, str], tmp_path: Path) -> None:
    """By what is open alone: a whole disk, a file's, and a partition's."""
    number, node = block_device
    (tmp_path / "io.max").touch()
    (tmp_path / "image").write_bytes(b"")
    limit = IoLimit(tmp_path, 1000)
    (tmp_path / "io.max").rename(tmp_path / "moved")
    found = tmp_path.stat().st_dev
    below = f"{os.major(found)}:{os.minor(found)}"
    if Path("/sys/dev/block", below).exists():
        below = device_number(str(tmp_path))
    nodes = {node: number, str(tmp_path / "image"): below}
    for partition in Path("/sys/class/block").glob("*/partition"):
        major, minor = map(int, (partition.parent / "dev").read_text().split(":"))
        os.mknod(tmp_path / "partition", 0o60600, os.makedev(major, minor))
        nodes[str(tmp_path / "partition")] = device_number(str(tmp_path / "partition"))
        break
    for path in nodes:
        fd = os.open(path, os.O_RDONLY)
        limit.apply(path, fd)
        os.close(fd)
    limit.close()
    words = "rbps=1000 wbps=1000"
    assert (tmp_path / "moved").read_text() == "".join(f"{n} {words}" for n in nodes.values())


def test_a_group_that_cannot_take_a_limit_is_removed(stand_in: Path) -> None:
    with pytest.raises(UserError, match=r"pids\.max = 5 in cgroup .*vdev-vm1: No such file"):
        Cgroup.enter("vm1", CgroupLimits(pids=5), stand_in)
    assert not (stand_in / "vdev-vm1").exists()


def test_a_parent_that_is_no_group(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cgroup v2"):
        Cgroup.enter("vm1", CgroupLimits(pids=5), tmp_path)
    with pytest.raises(UserError, match="No such file"):
        Cgroup.enter("vm1", None, tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\n", "x" * 201])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="machine name"):
        Cgroup.enter(name, None, tmp_path)


@pytest.mark.parametrize(
    "limits",
    [
        {"cpus": 0},
        {"cpus": -1},
        {"cpus": float("nan")},
        {"memory": 0},
        {"pids": 0},
        {"cpu_weight": 0},
        {"cpu_weight": 10001},
        {"io_weight": -5},
        {"cpuset": ""},
        {"cpuset": "0-"},
        {"cpuset": "0\n1"},
        {"io": {"/dev/x": {"bps": 1}}},
        {"io": {"/dev/x": {"rbps": 0}}},
    ],
    ids=str,
)
def test_limits_that_are_none(limits: dict[str, object]) -> None:
    with pytest.raises(UserError):
        CgroupLimits(**limits)  # type: ignore[arg-type]


def test_a_disk_is_found_by_what_lies_on_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies on no block device"):
        device_number("/proc/self/status")
    with pytest.raises(UserError, match="No such file"):
        device_number(str(tmp_path / "missing"))
    for partition in Path("/sys/class/block").glob("*/partition"):
        node = tmp_path / "partition"
        major, minor = map(int, (partition.parent / "dev").read_text().split(":"))
        os.mknod(node, 0o60600, os.makedev(major, minor))
        whole = (partition.parent.resolve().parent / "dev").read_text().strip()
        assert device_number(str(node)) == whole
        break
