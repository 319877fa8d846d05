"""The sandbox, by trying in a process of its own what must be refused, and what must not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdev._native import lib
from vdev.blk.image import open_image
from vdev.errors import UserError
from vdev.vmm import sandbox as sandbox_module
from vdev.vmm.sandbox import (
    EXIT_CODE,
    FREE_UIDS,
    Sandbox,
    SandboxOptions,
    free_uid,
    host_support,
    other_threads,
    python_paths,
    user_ids,
)

NOT_ROOT = 65534
ENOSYS = 38
LANDLOCK_CREATE_RULESET, MOUNT_SETATTR, UNSHARE = 444, 442, 272


def command(action: str, options: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "tests.vmm.confined", json.dumps(options), action]


def confined(action: str, **options: Any) -> dict[str, Any]:
    """What the action found, with the report of the sandbox that it was in."""
    done = subprocess.run(command(action, options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user may reach and write to; pytest's own are root's."""
    directory = Path(tempfile.mkdtemp(prefix="vdev-test-"))
    directory.chmod(0o777)
    (directory / "file").write_text("content")
    (directory / "file").chmod(0o644)
    yield directory
    shutil.rmtree(directory)
    Path("/var/tmp/vdev-sandbox-test").unlink(missing_ok=True)


FORBIDDEN = {
    "execve": ("execve", "control"),
    "execve in a thread": ("execve", "control"),
    "fork": ("clone", "control"),
    "inet": ("socket", "control"),
    "netlink": ("socket", "control"),
    "packet": ("socket", "control"),
    "setuid": ("setuid", "control"),
    "setgroups": ("setgroups", "control"),
    "kill": ("kill", "control"),
    "ptrace": ("ptrace", "control"),
    "mount": ("mount", "control"),
    "chroot": ("chroot", "control"),
    "io_uring in a vcpu": ("io_uring_setup", "vcpu"),
    "open in a vcpu": ("openat", "vcpu"),
}


@pytest.mark.parametrize("action", FORBIDDEN)
def test_what_is_forbidden_ends_the_process(action: str) -> None:
    call, thread_class = FORBIDDEN[action]
    done = subprocess.run(
        command(action, {"parent": os.getpid()}), capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_CODE == 159
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, "one line and nothing else"
    assert f"class {thread_class} made the forbidden system call {call} (" in lines[0]


def test_only_kept_paths_can_be_opened(place: Path) -> None:
    found = confined("opens", path=str(place), keep=[[str(place), True]])["result"]
    assert found["read inside"] == found["write inside"] == "done"
    assert (place / "new").read_bytes() == b"new"
    for refused in ("read outside", "write outside", "list /", "device"):
        assert found[refused] != "done"
    assert not Path("/var/tmp/vdev-sandbox-test").exists()


def test_a_path_can_be_kept_for_reading_alone(place: Path) -> None:
    found = confined("opens", path=str(place), keep=[[str(place), False]])["result"]
    assert found["read inside"] == "done"
    assert found["write inside"] != "done"
    assert not (place / "new").exists()


@pytest.mark.parametrize("part", ["own_root", "landlock"])
def test_either_fence_holds_alone(place: Path, part: str) -> None:
    other = {"own_root": "landlock", "landlock": "own_root"}[part]
    keep = [[str(place), True]]
    run = confined("opens", path=str(place), keep=keep, config={other: False})
    held = run["report"]["own_root"] if part == "own_root" else run["report"]["landlock"]
    assert held or any(part in line.lower().replace(" ", "_") for line in run["report"]["degraded"])
    if held:
        assert run["result"]["read outside"] == (
            "No such file or directory" if part == "own_root" else "Permission denied"
        )
        assert run["result"]["write outside"] != "done"
        assert run["result"]["device"] != "done"
    assert run["result"]["write inside"] == "done"


def test_a_kept_path_may_be_behind_a_link(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    path = str(tmp_path / "link")
    assert confined("opens", path=path, keep=[[path, True]])["result"]["write inside"] == "done"


def test_kept_paths_may_be_within_each_other(place: Path) -> None:
    inner = place / "inner"
    inner.mkdir()
    inner.chmod(0o777)
    keep = [[str(inner), True], [str(place), False], [str(place / "file"), False]]
    found = confined("opens", path=str(place), keep=keep)
    assert found["result"]["read inside"] == "done"
    assert found["result"]["write inside"] != "done"
    found = confined("event_loop", path=str(inner), keep=keep)
    assert found["result"]["said"] == "HELLO\n"


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_nothing_of_root_is_left(place: Path) -> None:
    options = {"keep": [[str(place), True]], "config": {"own_network": True, "open_files": 512}}
    with subprocess.Popen(
        command("whole", options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        pid = process.pid
        status = status_of(pid)
        root = os.listdir(f"/proc/{pid}/root")
        own = {name for name in ("mnt", "uts", "ipc", "net") if not same_namespace(pid, name)}
        owner = os.stat(f"/proc/{pid}/mem").st_uid
        result, _ = process.communicate("go on\n")
    report = json.loads(result)["report"]
    uid = said["ids"][0]
    assert uid in FREE_UIDS
    assert said["ids"] == [uid] * 6
    assert report["user"] == f"{uid}:{uid}"
    assert status["Groups"] == ""
    assert {status[f"Cap{kind}"].strip("0") for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {""}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert owner == 0, "a process that can be dumped belongs to its user"
    assert own == {"mnt", "uts", "ipc", "net"}
    assert report["namespaces"] == ["mount", "uts", "ipc", "network"]
    assert root == [place.parts[1]]
    found = json.loads(result)["result"]
    assert found == {"groups": [], "core": [0, 0], "files": [512, 512]}
    assert report["degraded"] == [] or report["landlock"] < 6


def same_namespace(pid: int, name: str) -> bool:
    return os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")


def test_a_user_may_be_named(place: Path) -> None:
    report = confined("nothing", config={"user": "12345:23456"})["report"]
    assert report["user"] == "12345:23456"
    assert confined("nothing", config={"user": "nobody"})["report"]["user"].startswith("65534:")


@pytest.mark.parametrize("action", ["event_loop", "plain_event_loop"])
def test_the_control_class_runs_an_event_loop(place: Path, action: str) -> None:
    found = confined(action, path=str(place), keep=[[str(place), True]])["result"]
    assert found == {"said": "HELLO\n", "other thread": True}


@pytest.fixture(params=["file", "block device"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk that only root can open."""
    backing = tmp_path / "disk.img"
    with backing.open("wb") as file:
        file.truncate(1 << 20)
    backing.chmod(0o600)
    if request.param == "file":
        yield backing
        return
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "threads"}, {"cache": "none"}, {"config": {"io_uring": False}}],
    ids=json.dumps,
)
def test_an_iothread_serves_a_disk(image: Path, options: dict[str, Any]) -> None:
    """With io_uring, with workers, with both; no path is kept, for the disk is open."""
    found = confined("disk", image=str(image), **options)["result"]
    assert found["kept"]
    assert found["zeroed"]
    if "config" in options:
        assert not found["io_uring"]


def test_what_was_passed_can_be_used(image: Path, place: Path) -> None:
    """Nothing can be opened; disks are looked at and copied by their descriptors alone."""
    (place / "copy").touch()
    (place / "source").write_bytes(b"hello".ljust(3 << 20, b"\0"))
    opened = open_image(str(image))
    outside = {"kind": opened.kind, "size": opened.size, "discards": opened.can_discard}
    opened.close()
    paths = [str(path) for path in (image, place / "copy", place / "source")]
    found = confined("passed", **{"pass": paths})["result"]
    assert found == outside
    assert (place / "copy").read_bytes() == (place / "source").read_bytes()


def test_sockets_of_other_families_may_be_allowed() -> None:
    run = confined("netlink", config={"families": ["unix", "netlink"]})
    assert run["report"]["families"] == ["unix", "netlink"]


def test_abstract_sockets_of_others_are_out_of_reach() -> None:
    name = f"\0vdev-sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        run = confined("abstract", name=name)
    if run["report"]["landlock"] >= 6:
        assert run["result"] == "Operation not permitted"
    else:
        assert any("abstract" in line or "none" in line for line in run["report"]["degraded"])


def test_a_dialer_reaches_what_its_owner_cannot(tmp_path: Path) -> None:
    """A socket of root's, in a folder of root's."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()

        def echo() -> None:
            with listening.accept()[0] as sock:
                sock.sendall(sock.recv(16).upper())

        thread = threading.Thread(target=echo)
        thread.start()
        run = confined("dials", dial=str(tmp_path / "s"))
        thread.join()
    assert run["result"] == {"by path": "No such file or directory", "said": "HELLO\n"}


@pytest.mark.parametrize("dumpable", [True, False])
def test_without_root_it_does_what_it_can(place: Path, dumpable: bool) -> None:
    """A process that cannot be dumped cannot have a user namespace."""
    keep = [[str(place), True]]
    run = confined("opens", path=str(place), keep=keep, become=NOT_ROOT, dumpable=dumpable)
    report = run["report"]
    assert report["user"] == f"{NOT_ROOT}:{NOT_ROOT}"
    assert "user" in report["namespaces"] or any("root" in line for line in report["degraded"])
    assert dumpable or "user" not in report["namespaces"]
    assert report["own_root"] or any("own root" in line for line in report["degraded"])
    assert run["result"]["write inside"] == "done"
    assert run["result"]["read outside"] != "done"


@pytest.mark.parametrize(
    ("number", "what"),
    [(LANDLOCK_CREATE_RULESET, "Landlock"), (MOUNT_SETATTR, "own root"), (UNSHARE, "namespace")],
)
def test_what_the_kernel_lacks_is_named(place: Path, number: int, what: str) -> None:
    """A kernel without a part is played by a filter that refuses its system call."""
    keep = [[str(place), True]]
    run = confined("opens", path=str(place), keep=keep, refuse=[number, ENOSYS])
    report = run["report"]
    assert any(line.startswith(what) or what in line for line in report["degraded"]), report
    assert run["result"]["write inside"] == "done"
    assert run["result"]["write outside"] != "done"
    if report["own_root"] or report["landlock"]:
        assert run["result"]["read outside"] != "done"


def test_what_is_not_asked_for_is_named() -> None:
    config = {"seccomp": False, "landlock": False, "namespaces": False}
    degraded = confined("nothing", config=config)["report"]["degraded"]
    for part in ("seccomp", "Landlock", "namespaces", "own root"):
        assert any(line.startswith(part) for line in degraded), part


def test_it_is_entered_once() -> None:
    assert confined("twice")["result"] == "this process is in its sandbox already"


def test_running_threads_are_told_of() -> None:
    """Linux would leave them outside."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert len(other_threads()) >= 1
        with pytest.raises(RuntimeError, match="would not hold for running threads"):
            Sandbox().enter()
    finally:
        done.set()
        thread.join()


def test_a_path_that_does_not_exist_is_a_mistake(tmp_path: Path) -> None:
    options = {"keep": [[str(tmp_path / "nothing-here"), False]]}
    done = subprocess.run(command("nothing", options), capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr
    assert "nothing-here is to be kept for the sandbox, but does not exist" in done.stderr


@pytest.mark.parametrize(
    ("user", "what"),
    [
        ("root", "unprivileged"),
        ("0", "unprivileged"),
        ("1000:0", "unprivileged"),
        ("4294967295", "unprivileged"),
        ("no-such-user", "does not exist"),
        ("12:x", "does not exist"),
        ("", "does not exist"),
        ("-1", "does not exist"),
    ],
)
def test_users_that_cannot_be_taken(user: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        SandboxOptions(user=user)


def test_mistakes_in_the_configuration() -> None:
    with pytest.raises(UserError, match="family 'ipx'"):
        SandboxOptions(families=("ipx",))
    with pytest.raises(UserError, match="open files"):
        SandboxOptions(open_files=3)


def test_a_free_user_has_no_name_and_no_process() -> None:
    uid = free_uid()
    assert uid in FREE_UIDS
    assert user_ids(str(uid)) == (uid, uid)


def test_a_user_of_a_process_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    users = FREE_UIDS[-2:]
    monkeypatch.setattr(sandbox_module, "FREE_UIDS", users)
    with contextlib.ExitStack() as stack:
        for user in users:
            process = stack.enter_context(
                subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=user)
            )
            stack.callback(process.kill)
            if user == users[0]:
                assert {free_uid() for _ in range(20)} == {users[1]}
        with pytest.raises(UserError, match="every user from"):
            free_uid()


def test_the_host_is_described() -> None:
    found = {part.name: part for part in host_support()}
    assert found["Landlock"].ok == (lib.sandbox_landlock_abi() > 0)
    assert found["another user"].ok == (os.geteuid() == 0)
    assert set(found) == {"seccomp", "Landlock", "namespaces", "another user"}


def test_modules_can_be_imported_from_kept_paths() -> None:
    keep = [[os.fspath(kept.path), False] for kept in python_paths()]
    assert confined("import", keep=keep)["result"] == "colorsys"
