"""Servers in the foreground: from the first answer to a clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.frontend.session import Session
from tests.frontend.wire import TIMEOUT, Wire

from .conftest import VDEV, VDEV_BLK, Run, Start, control_socket

BLK = ("blk", "serve", "--socket-path", "s", "--blk-file", "null:1M")


def answers(path: str) -> bool:
    with Session(path) as session:
        return session.get_features() != 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("connected", [False, True])
def test_a_signal_ends_it_cleanly(
    start: Start, folder: Path, loop: str, number: signal.Signals, connected: bool
) -> None:
    server = start(*BLK, "--loop", loop)
    control = control_socket(server.pid)
    assert control.is_socket()
    session = Session("s")
    assert session.get_features()
    if not connected:
        session.close()
    server.process.send_signal(number)
    assert server.process.wait(TIMEOUT) == 0
    session.close()
    assert server.output == ""
    assert os.listdir(folder) == []
    assert not control.exists()


def test_nohup_is_respected(start: Start) -> None:
    server = start(*BLK, program=("nohup", *VDEV))
    server.process.send_signal(signal.SIGHUP)
    assert answers("s")
    assert server.stop() == 0


def test_what_a_killed_server_left_is_replaced(start: Start, disk: str) -> None:
    arguments = ("blk", "serve", "--socket-path", "s", "--blk-file", disk)
    first = start(*arguments)
    first.process.kill()
    first.process.wait(TIMEOUT)
    assert Path("s").is_socket()
    second = start(*arguments)
    assert answers("s")
    assert not control_socket(first.pid).exists()
    assert second.stop() == 0
    assert not Path("s").exists()


def test_a_connected_fd_serves_one_front_end(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*VDEV_BLK, "--fd", str(theirs.fileno()), "--blk-file", "null:1M"],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    with process:
        with Session(Wire(ours)) as session:
            assert session.get_features()
        _, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (0, b"")


def test_a_listening_fd_serves_one_front_end_after_another(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        process = subprocess.Popen(
            [*VDEV_BLK, "--fd", str(listening.fileno()), "--blk-file", "null:1M"],
            pass_fds=[listening.fileno()],
        )
    with process:
        for _ in range(2):
            assert answers("s")
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_it_connects_to_a_front_end_that_listens(start: Start) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        listening.settimeout(TIMEOUT)
        server = start(*BLK, "--connect")
        for _ in range(2):
            with Session(Wire(listening.accept()[0])) as session:
                assert session.get_features()
        assert server.stop() == 0


def test_a_front_end_that_does_not_listen_yet_is_waited_for(start: Start) -> None:
    server = start(*BLK, "--connect")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        listening.settimeout(TIMEOUT)
        with Session(Wire(listening.accept()[0])) as session:
            assert session.get_features()
    assert server.stop() == 0


def test_no_device_of_a_file_that_is_wrong_is_left(start: Start, vdev: Run, disk: str) -> None:
    Path("vm.toml").write_text(
        f'[[blk]]\nsocket = "a"\nimage = "{disk}"\n[[blk]]\nsocket = "b"\nimage = "{disk}"\n'
    )
    result = vdev("serve", "vm.toml")
    assert result.returncode == 2
    assert "in use by this process" in result.stderr
    assert not Path("a").exists()


def test_many_devices_in_one_process(start: Start, vdev: Run, disk: str) -> None:
    Path("vm.toml").write_text(
        f"""
        [server]
        iothreads = 2
        poll_us = 0

        [[blk]]
        socket = "root.sock"
        image = "{disk}"
        serial = "root"

        [[blk]]
        name = "scratch"
        socket = "scratch.sock"
        image = "null:64MiB"
        queues = 2
        """
    )
    server = start("serve", "vm.toml")
    assert answers("root.sock")
    assert answers("scratch.sock")
    (status,) = json.loads(vdev("status", server.pid, "--json").stdout)
    assert status["pid"] == server.pid
    assert len(status["iothreads"]) == 2
    assert [device["name"] for device in status["devices"]] == ["blk0", "scratch"]
    assert [device["image"]["size"] for device in status["devices"]] == [1 << 20, 64 << 20]
    assert server.stop() == 0
    assert sorted(os.listdir()) == [disk, "vm.toml"]


def test_it_starts_without_what_it_does_not_need(folder: Path) -> None:
    """What takes long to import is not on the way to the first answer."""
    heavy = ("pydantic", "rich", "pyroute2", "hypothesis", "pytest", "tomllib")
    code = (
        "import sys, vdev.cli; code = vdev.cli.main(); "
        f"print([name for name in {heavy} if name in sys.modules]); sys.exit(code)"
    )
    process = subprocess.Popen(
        [VDEV[0], "-c", code, *BLK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        wait_for_socket("s", process)
        assert answers("s")
        process.terminate()
        output, errors = process.communicate(timeout=TIMEOUT)
    assert (output, errors, process.returncode) == ("[]\n", "", 0)


def wait_for_socket(path: str, process: subprocess.Popen[str]) -> None:
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(path)
            except OSError:
                assert process.poll() is None
                continue
            return
