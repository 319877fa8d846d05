"""`vdev upgrade` as a user has it, and of `vdev serve` with its workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.blk import SECTOR, BlkClient, check_healthy
from tests.frontend.replaced import Replaced, failing
from tests.frontend.server import Server
from tests.frontend.wire import TIMEOUT
from tests.frontend.writer import AREA, DEPTH, Writer
from vdev.runtime import runtime_dir
from vdev.server.control import request

VDEV = (sys.executable, "-m", "vdev")


def vdev(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VDEV, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def refusal(*arguments: object) -> str:
    """The one line that is said with exit code 2."""
    done = vdev("upgrade", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with open("disk.img", "wb") as file:
        file.truncate(AREA * SECTOR)
    return tmp_path


@pytest.fixture
def server() -> Iterator[Replaced]:
    with Replaced.vdev("blk", "serve", "--socket-path", "s", "--blk-file", "disk.img") as server:
        yield server


def test_by_process_id_and_by_socket(server: Replaced) -> None:
    with BlkClient("s") as disk:
        for name in (server.pid, None):
            last = server.pid
            done = vdev("upgrade", name or server.control)
            words = done.stdout.split()
            assert (done.returncode, done.stderr) == (0, "")
            assert words[:2] == [f"{last}:", "process"]
            server.follow(int(words[2]))
            assert disk.read(0, SECTOR) == bytes(SECTOR)
        (status,) = json.loads(vdev("status", server.pid, "--json").stdout)
        assert status["devices"][0]["state"] == "connected"
        assert status["devices"][0]["front_end_pid"] == os.getpid()


def test_the_service_manager_is_told(server: Replaced) -> None:
    server.notify.settimeout(TIMEOUT)
    pid = server.upgrade()
    assert server.notify.recv(4096) == f"MAINPID={pid}".encode()
    assert server.terminate_last() == 0
    assert server.notify.recv(4096) == b"STOPPING=1"


def test_another_program(server: Replaced, folder: Path) -> None:
    program = folder / "another"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom vdev.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    done = vdev("upgrade", server.pid, "--program", "./another")
    server.follow(int(done.stdout.split()[2]))
    assert str(program) in Path(f"/proc/{server.pid}/cmdline").read_text()
    check_healthy("s")


@pytest.mark.parametrize(
    ("script", "timeout", "why"),
    [
        ("#!/bin/sh\nexit 3\n", 30, "the other end has gone|cannot be sent"),
        ("#!/bin/sh\nexec sleep 1000\n", 0.5, "it takes too long to start"),
        (
            f"#!{sys.executable}\nimport sys\nfrom vdev.server import orders\norders.FORMAT += 1\n"
            "from vdev.cli import main\nsys.exit(main())\n",
            30,
            "the other end has gone",
        ),
        (None, 30, "no program is there"),
    ],
    ids=["ends", "hangs", "another format", "missing"],
)
def test_programs_that_cannot_go_on(
    server: Replaced, folder: Path, script: str | None, timeout: float, why: str
) -> None:
    program = folder / "bad"
    if script is not None:
        program.write_text(script)
        program.chmod(0o755)
    with BlkClient("s") as disk:
        line = refusal(server.pid, "--program", program, "--timeout", timeout)
        assert re.search(why, line)
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        server.check_alive()
        assert request(server.control, "status")["pid"] == server.pid


def test_the_orders_of_another_format_are_named(server: Replaced, folder: Path) -> None:
    program = folder / "newer"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom vdev.server import orders\norders.FORMAT += 1\n"
        "from vdev.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    refusal(server.pid, "--program", program)
    assert "vdev: orders of format 1, but this is vdev with format 2" in server.output


def test_who_is_not_there(server: Replaced) -> None:
    assert "no server answers there" in refusal("/nowhere/s")


def test_all(server: Replaced) -> None:
    """Of this user: also of other tests that run meanwhile, so here the directory is our own."""
    runtime = Path("run").absolute()
    runtime.mkdir(mode=0o700)
    code = (
        "import pathlib, sys, vdev.cli.upgrade as u, vdev.server.control as c\n"
        f"u.find_servers = lambda: c.find_servers(pathlib.Path({str(runtime)!r}))\n"
        "from vdev.cli import main\nsys.exit(main(['upgrade', '--all']))\n"
    )
    os.link(server.control, runtime / f"{server.pid}.sock")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    server.follow(int(done.stdout.split()[2]))


def test_two_at_once(server: Replaced, folder: Path) -> None:
    hanging = failing(folder, "ready", "hang")
    with subprocess.Popen(
        [*VDEV, "upgrade", str(server.pid), "--program", hanging, "--timeout", "5"],
        stderr=subprocess.PIPE,
    ) as first:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        while not children.read_text():
            time.sleep(0.01)
        assert "already" in refusal(server.pid)
        assert "ask again" in vdev("resize", server.pid, "blk0", "2M").stderr
        first.communicate()
    assert first.returncode == 2


def test_stopped_while_it_is_replaced(server: Replaced, folder: Path) -> None:
    """The end waits for the hand-over to fail, and then comes."""
    hanging = failing(folder, "ready", "hang")
    with subprocess.Popen(
        [*VDEV, "upgrade", str(server.pid), "--program", hanging, "--timeout", "2"],
        stderr=subprocess.PIPE,
    ) as asking:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        while not children.read_text():
            time.sleep(0.01)
        server.process.terminate()
        asking.communicate()
    assert server.process.wait(TIMEOUT) == 0
    assert not Path("s").exists()


class TestWorkers:
    """`vdev serve` stays, and its workers are replaced."""

    @pytest.fixture(params=["together", "isolated"])
    def server(self, request: pytest.FixtureRequest) -> Iterator[Server]:
        Path("two.toml").write_text(
            '[[blk]]\nsocket = "s"\nimage = "disk.img"\nqueues = 2\n'
            '[[blk]]\nsocket = "n"\nimage = "null:1M"\n'
        )
        isolate = ("--isolate",) if request.param == "isolated" else ()
        with Server.vdev("serve", *isolate, "two.toml") as server:
            yield server

    def test_again_and_again_under_load(self, server: Server) -> None:
        with BlkClient("s", queues=2) as disk, BlkClient("n") as null:
            writer = Writer(disk, seed=3)
            seen = {*workers(server)}
            for _ in range(5):
                writer.fill()
                asking = subprocess.Popen([*VDEV, "upgrade", str(server.pid)])
                while asking.poll() is None:
                    writer.take(writer.random.randrange(DEPTH))
                    writer.fill()
                    null.read(0, SECTOR)
                assert asking.returncode == 0
                assert not seen & {*workers(server)}
                seen |= {*workers(server)}
            writer.finish()
            writer.check()
        assert server.output == ""
        assert [worker["restarts"] for worker in status(server)["workers"]] == [0] * len(
            workers(server)
        )
        assert server.stop() == 0

    def test_the_next_one_is_started_again_when_it_crashes(self, server: Server) -> None:
        assert vdev("upgrade", server.pid).returncode == 0
        os.kill(workers(server)[0], 9)
        check_healthy("s", queues=2)
        assert status(server)["workers"][0]["restarts"] == 1

    @pytest.mark.parametrize("step", ["ready", "prepared", "serving"])
    def test_a_successor_that_fails(self, server: Server, folder: Path, step: str) -> None:
        before = workers(server)
        with BlkClient("s", queues=2) as disk:
            disk.write(0, b"\3" * SECTOR)
            line = refusal(server.pid, "--program", failing(folder, step, "die"))
            assert "this server goes on" in line
            assert disk.read(0, SECTOR) == b"\3" * SECTOR
        assert workers(server) == before


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = request(runtime_dir() / f"{server.pid}.sock", "status")
    return found


def workers(server: Server) -> list[int]:
    return [worker["pid"] for worker in status(server)["workers"]]
