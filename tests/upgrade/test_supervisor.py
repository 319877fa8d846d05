"""`vdev upgrade` of `vdev serve`: the supervisor is the new program, too, and the same process."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.blk import SECTOR, BlkClient, check_healthy
from tests.frontend.server import Server
from tests.frontend.survivor import Survivor
from tests.frontend.wire import TIMEOUT
from tests.frontend.writer import AREA, DEPTH, Writer
from vdev.errors import UserError
from vdev.runtime import runtime_dir
from vdev.server.control import request

VDEV = (sys.executable, "-m", "vdev")
VERSION = "99.9"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with open("disk.img", "wb") as file:
        file.truncate(AREA * SECTOR)
    Path("two.toml").write_text(
        '[[blk]]\nsocket = "s"\nimage = "disk.img"\nqueues = 2\n'
        '[[blk]]\nsocket = "n"\nimage = "null:1M"\n'
    )
    return tmp_path


@pytest.fixture(params=["together", "isolated"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    isolate = ("--isolate",) if request.param == "isolated" else ()
    with Server.vdev("serve", *isolate, "two.toml") as server:
        yield server


@pytest.fixture
def single() -> Iterator[Server]:
    with Server.vdev("serve", "two.toml") as server:
        yield server


def program(folder: Path, what: str = "", name: str = "new") -> str:
    """A vdev of VERSION that does `what` first, knowing what it is there for: `work`, one of the
    `attempts` (the first or the second), or to `become` the supervisor."""
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys\n"
        "import vdev\n"
        f"vdev.__version__ = {VERSION!r}\n"
        "work = sys.argv[1] == 'worker'\n"
        "attempts, become = 0, not work\n"
        "if '--attempt' in sys.argv:\n"
        f"    with open({str(folder / name)!r} + '.attempts', 'a+') as file:\n"
        "        file.write('x')\n"
        "        attempts, become = file.tell(), False\n"
        "def children(pid):\n"
        "    with open(f'/proc/{pid}/task/{pid}/children') as file:\n"
        "        return {int(pid) for pid in file.read().split()} - {os.getpid()}\n"
        f"{what}\n"
        "from vdev.cli import main\n"
        "sys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)


def upgrade(server: Server, **arguments: Any) -> dict[str, Any]:
    answer: dict[str, Any] = request(control(server), "upgrade", patience=None, **arguments)
    return answer


def control(server: Server) -> Path:
    return runtime_dir() / f"{server.pid}.sock"


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = request(control(server), "status", patience=None)
    return found


def workers(server: Server) -> list[int]:
    return [worker["pid"] for worker in status(server)["workers"]]


def restarts(server: Server) -> int:
    return sum(worker["restarts"] for worker in status(server)["workers"])


def children(server: Server) -> set[int]:
    text = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return {int(pid) for pid in text.split()}


def fds(pid: int) -> Counter[str]:
    """By what they are, without numbers."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[os.readlink(f"/proc/{pid}/fd/{name}").split(":[")[0]] += 1
        except FileNotFoundError:
            continue
    return found


def held(server: Server) -> list[Counter[str]]:
    """By the supervisor and each worker."""
    return [fds(pid) for pid in (server.pid, *workers(server))]


def check_closed_on_exec(pid: int) -> None:
    """All but the standard streams, so that nothing that it starts has more than it is given."""
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            lines = Path(f"/proc/{pid}/fdinfo/{name}").read_text().splitlines()
        except FileNotFoundError:
            continue
        (flags,) = [line.split()[1] for line in lines if line.startswith("flags:")]
        assert int(name) < 3 or int(flags, 8) & os.O_CLOEXEC, (name, flags)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], TIMEOUT)[0], "the process has not ended"
    os.close(pidfd)


def check_serves() -> None:
    """Both devices."""
    check_healthy("s", queues=2)
    with BlkClient("n") as null:
        assert null.read(0, SECTOR) == bytes(SECTOR)


def check_ended(server: Server, *, code: int = 0) -> None:
    """Nothing of it is left but the image and the programs."""
    assert server.process.wait(TIMEOUT) == code
    assert not Path("s").exists()
    assert not Path("n").exists()
    assert not control(server).exists()


def test_all_that_runs_is_the_new_program(server: Server, folder: Path) -> None:
    old = {server.pid, *workers(server)}
    began = status(server)["uptime_s"]
    with BlkClient("s", queues=2) as disk, BlkClient("n") as null:
        disk.write(0, b"\3" * SECTOR)
        answer = upgrade(server, program=program(folder))
        assert answer["pid"] == server.pid
        assert answer["pause_ms"] > 0
        found = status(server)
        assert (found["pid"], found["version"]) == (server.pid, VERSION)
        assert found["uptime_s"] > began
        assert [device["connections"] for device in found["devices"]] == [1, 1]
        assert [device["name"] for device in found["devices"]] == ["blk0", "blk1"]
        assert not old & {*workers(server)}
        assert children(server) == {*workers(server)}
        for pid in (server.pid, *workers(server)):
            assert str(folder / "new") in Path(f"/proc/{pid}/cmdline").read_text()
        assert disk.read(0, SECTOR) == b"\3" * SECTOR
        assert null.read(0, SECTOR) == bytes(SECTOR)
    assert restarts(server) == 0
    assert server.output == ""
    # systemd knows that it is ready, and its process is the same.
    assert select.select([server.notify], [], [], 0)[0] == []
    check_closed_on_exec(server.pid)
    assert server.stop() == 0
    assert server.notify.recv(4096) == b"STOPPING=1"
    check_ended(server)


def test_ten_in_a_row_leave_nothing_behind(server: Server, folder: Path) -> None:
    programs = [program(folder, name="one"), program(folder, name="two")]
    upgrade(server, program=programs[0])
    before = held(server)
    with BlkClient("s", queues=2) as disk:
        writer = Writer(disk, seed=5)
        for number in range(10):
            writer.fill()
            upgrade(server, program=programs[number % 2])
            writer.take(writer.random.randrange(DEPTH))
            assert len(children(server)) == len(workers(server))
        writer.finish()
        writer.check()
    wait_for(lambda: all(now <= then for now, then in zip(held(server), before, strict=True)))
    check_closed_on_exec(server.pid)
    assert restarts(server) == 0
    assert server.output == ""
    server.stop()
    check_ended(server)


def test_without_another_program_it_is_that_which_runs(single: Server, folder: Path) -> None:
    upgrade(single, program=program(folder))
    upgrade(single)
    assert status(single)["version"] == VERSION


class TestDeaths:
    @pytest.mark.parametrize("upgrades", [1, 2])
    def test_of_a_worker_afterwards(self, server: Server, folder: Path, upgrades: int) -> None:
        """What was in flight is done by the next, which is of the new program."""
        with Survivor(Path("s"), queues=2) as disk:
            writer = Writer(disk, seed=7)
            for _ in range(upgrades):
                writer.fill()
                upgrade(server, program=program(folder))
                writer.take(writer.random.randrange(DEPTH))
            writer.fill()
            os.kill(workers(server)[0], signal.SIGKILL)
            disk.wire.wait_closed()
            disk.reconnect()
            writer.finish()
            writer.check()
        assert restarts(server) == 1
        assert server.output.count("was ended by SIGKILL: it is started again\n") == 1
        for pid in workers(server):
            assert str(folder / "new") in Path(f"/proc/{pid}/cmdline").read_text()

    def test_of_the_workers_in_the_exec(self, server: Server, folder: Path) -> None:
        """When the next program has not begun yet."""
        killing = "if become:\n    [os.kill(pid, signal.SIGKILL) for pid in children(os.getpid())]"
        upgrade(server, program=program(folder, killing))
        check_serves()
        assert restarts(server) == len(workers(server))
        assert children(server) == {*workers(server)}
        server.stop()
        check_ended(server)

    def test_of_a_worker_before_the_exec(self, server: Server, folder: Path) -> None:
        """The old supervisor starts it again, and the next goes on with that."""
        killing = "if attempts == 2:\n    os.kill(min(children(os.getppid())), signal.SIGKILL)"
        upgrade(server, program=program(folder, killing))
        check_serves()
        assert restarts(server) == 1
        assert status(server)["version"] == VERSION
        assert children(server) == {*workers(server)}

    def test_what_died_before_is_remembered(self, single: Server, folder: Path) -> None:
        """A worker that does not last is not started at once, whoever supervises."""
        os.kill(workers(single)[0], signal.SIGKILL)
        check_serves()
        upgrade(single, program=program(folder))
        assert restarts(single) == 1
        os.kill(workers(single)[0], signal.SIGKILL)
        wait_for(lambda: "it is started again in 0.1 s, as it does not last" in single.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_exec(server: Server, folder: Path, number: signal.Signals) -> None:
    """It is the new one's, who has ended the workers before it ends itself."""
    sending = (
        "if become:\n"
        "    print(*children(os.getpid()), file=open('left', 'w'))\n"
        f"    os.kill(os.getpid(), {int(number)})"
    )
    upgrading = subprocess.Popen(
        [*VDEV, "upgrade", str(server.pid), "--program", program(folder, sending)],
        stderr=subprocess.DEVNULL,
    )
    check_ended(server)
    upgrading.wait(TIMEOUT)
    left = Path("left").read_text().split()
    assert left
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)
    assert server.output == ""
    assert server.notify.recv(4096) == b"STOPPING=1"


def test_a_signal_just_before_the_exec(server: Server, folder: Path) -> None:
    """It is the old one's."""
    pidfds = [os.pidfd_open(pid) for pid in workers(server)]
    sending = f"if attempts == 2:\n    os.kill(os.getppid(), {int(signal.SIGTERM)})"
    with pytest.raises((UserError, ConnectionError)):
        upgrade(server, program=program(folder, sending))
    for pidfd in pidfds:
        wait_for_end(pidfd)
    check_ended(server)
    assert server.output == ""


@pytest.mark.parametrize("times", [0, 2])
def test_nohup_is_respected(folder: Path, times: int) -> None:
    with Server(["nohup", *VDEV, "serve", "two.toml"]) as server:
        for _ in range(times):
            upgrade(server, program=program(folder))
        server.process.send_signal(signal.SIGHUP)
        check_serves()
        assert server.stop() == 0


BROKEN = {
    "cannot be imported": "sys.modules['vdev.server.supervisor'] = None",
    "has no such command": "if not work: sys.exit('vdev: invalid choice: supervisor')",
    "ends well and says nothing": "if not work: sys.exit(0)",
    "another format": "import vdev.server.reexec as r\nr.FORMAT += 1",
    "another state": (
        "from vdev.server.supervised import Worker\n"
        "def restore(state, fds): raise KeyError('unheard_of')\n"
        "Worker.restore = restore"
    ),
    "hangs": "if not work: signal.pause()",
    "is killed": "if not work: os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("what", BROKEN.values(), ids=BROKEN)
def test_a_program_that_cannot_supervise_changes_nothing(
    single: Server, folder: Path, what: str
) -> None:
    before, open_before = workers(single), fds(single.pid)
    with BlkClient("s", queues=2) as disk:
        timeout = 0.5 if "pause" in what else 30
        with pytest.raises(UserError, match=r"cannot be the supervisor: .*this server goes on"):
            upgrade(single, program=program(folder, what), timeout=timeout)
        assert disk.read(0, SECTOR) == bytes(SECTOR)
    assert workers(single) == before
    assert children(single) == {*before}
    assert status(single)["version"] != VERSION
    wait_for(lambda: fds(single.pid) <= open_before)
    upgrade(single, program=program(folder))
    assert status(single)["version"] == VERSION
    single.stop()
    check_ended(single)


def test_the_reason_is_in_the_answer(single: Server, folder: Path) -> None:
    with pytest.raises(UserError, match="a supervisor of format 1, but this is vdev with format 2"):
        upgrade(single, program=program(folder, BROKEN["another format"]))
    with pytest.raises(UserError, match="unheard_of"):
        upgrade(single, program=program(folder, BROKEN["another state"]))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("if attempts == 2: sys.exit(1)", "cannot be the supervisor"),
        ("if attempts == 2: os.unlink(sys.argv[0])", "No such file or directory"),
        ("if attempts == 2: os.chmod(sys.argv[0], 0o644)", "Permission denied"),
    ],
    ids=["broken meanwhile", "removed meanwhile", "not to be run meanwhile"],
)
def test_a_program_that_fails_at_the_end(server: Server, folder: Path, what: str, why: str) -> None:
    """The workers are of that program, the supervisor goes on and starts them again."""
    before = workers(server)
    with BlkClient("s", queues=2) as disk:
        with pytest.raises(UserError, match=f"{why}.*; this supervisor goes on, with workers of"):
            upgrade(server, program=program(folder, what))
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        assert not {*before} & {*workers(server)}
        assert status(server)["version"] != VERSION
        check_closed_on_exec(server.pid)
        upgrade(server, program=program(folder, name="better"))
        assert status(server)["version"] == VERSION
        assert disk.read(0, SECTOR) == bytes(SECTOR)
    os.kill(workers(server)[0], signal.SIGKILL)
    check_serves()
    assert server.stop() == 0
    check_ended(server)


class TestControlClients:
    def test_who_asks_all_the_time_is_answered(self, server: Server, folder: Path) -> None:
        done = threading.Event()
        versions: set[str] = set()
        failed: list[BaseException] = []

        def ask() -> None:
            while not done.is_set():
                try:
                    versions.add(status(server)["version"])
                except BaseException as error:
                    failed.append(error)
                    return

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        for _ in range(3):
            upgrade(server, program=program(folder))
        done.set()
        for thread in asking:
            thread.join()
        assert failed == []
        assert VERSION in versions
        assert len(versions) == 2

    def test_who_is_connected_stays(self, single: Server, folder: Path) -> None:
        """Saying nothing, in the middle of a line, or with a descriptor that has come with it."""
        line = b'{"command": "status"}\n'
        with connected(single) as silent, connected(single) as speaking, connected(single) as third:
            speaking.sendall(line + line[:9])
            assert answer(speaking)["result"]["pid"] == single.pid
            socket.send_fds(third, [b'{"command": "status", "fds"'], [silent.fileno()])
            status(single)  # so that what came before has been read
            for _ in range(2):
                upgrade(single, program=program(folder))
            silent.sendall(line)
            speaking.sendall(line[9:])
            third.sendall(b': ["one"]}\n')
            for peer in (silent, speaking, third):
                assert answer(peer)["result"]["version"] == VERSION

    def test_what_is_asked_behind_it_is_answered(self, single: Server, folder: Path) -> None:
        asked = {"command": "upgrade", "program": program(folder)}
        with connected(single) as peer:
            peer.sendall(json.dumps(asked).encode() + b'\n{"command": "status"}\n')
            assert answer(peer)["result"]["pid"] == single.pid
            assert answer(peer)["result"]["version"] == VERSION

    def test_who_has_left_meanwhile(self, single: Server, folder: Path) -> None:
        with connected(single) as peer:
            asked = {"command": "upgrade", "program": program(folder)}
            peer.sendall(json.dumps(asked).encode() + b"\n")
        wait_for(lambda: status(single)["version"] == VERSION)
        assert single.stop() == 0

    def test_two_at_once(self, single: Server, folder: Path) -> None:
        with connected(single) as peer:
            asked = {"command": "upgrade", "program": program(folder, BROKEN["hangs"])}
            peer.sendall(json.dumps({**asked, "timeout": 5}).encode() + b"\n")
            wait_for(lambda: len(children(single)) == 2)
            with pytest.raises(UserError, match="another program is taking over already"):
                upgrade(single)
            assert not answer(peer)["ok"]


def connected(server: Server) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(control(server)))
    return peer


def answer(peer: socket.socket) -> Any:
    """One line, and not a byte more."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        assert byte, "the connection has ended"
        line += byte
    return json.loads(line)
