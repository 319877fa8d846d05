"""The dialer: whom it connects to, and when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.machines import children_of, wait_for_end
from vdev.machines.dialer import Dialer


@pytest.fixture
def dialer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dialer]:
    monkeypatch.chdir(tmp_path)
    dialer, child = forked("first", str(tmp_path / "second"))
    yield dialer
    dialer.close()
    assert os.waitpid(child, 0) == (child, 0)


def forked(*paths: str) -> tuple[Dialer, int]:
    """A dialer, and its process."""
    before = children_of(os.getpid())
    dialer = Dialer(paths)
    (child,) = set(children_of(os.getpid())) - set(before)
    return dialer, child


def listening(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock


@pytest.mark.parametrize("path", ["first", "second"])
def test_a_connection_is_passed_on(dialer: Dialer, path: str) -> None:
    for _ in range(2):
        with listening(path) as server, dialer.connect(path) as ours:
            assert ours.gettimeout() is None
            theirs, _ = server.accept()
            with theirs:
                ours.sendall(b"there")
                assert theirs.recv(16) == b"there"
                theirs.sendall(b"back")
                assert ours.recv(16) == b"back"
        os.unlink(path)  # and the next one listens on another socket there


def test_why_there_is_none(dialer: Dialer) -> None:
    with pytest.raises(FileNotFoundError, match="first"):
        dialer.connect("first")
    listening("second").close()
    with pytest.raises(ConnectionRefusedError, match="second"):
        dialer.connect("second")
    with listening("first"), dialer.connect("first"):
        pass  # it goes on after errors


def test_nobody_else_is_reached(dialer: Dialer) -> None:
    with listening("third"), pytest.raises(ValueError, match="third"):
        dialer.connect("third")


def test_a_dialer_that_was_killed(tmp_path: Path) -> None:
    dialer, child = forked(str(tmp_path / "first"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(2):
        with pytest.raises(OSError, match=r"gone|Broken pipe|reset"):
            dialer.connect(str(tmp_path / "first"))
    dialer.close()


def test_it_ends_with_a_killed_process() -> None:
    program = """
import sys
from vdev.machines.dialer import Dialer

dialer = Dialer(["missing"])
try:
    dialer.connect("missing")
except FileNotFoundError:
    print("asked", flush=True)
sys.stdin.read()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "asked\n"
    (child,) = children_of(owner.pid)
    assert len(os.listdir(f"/proc/{child}/fd")) == 4
    owner.kill()
    owner.communicate()
    wait_for_end(child)
