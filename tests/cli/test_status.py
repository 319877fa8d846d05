"""Asking servers that run: status, resize, link, stop."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frontend.session import Session
from tests.frontend.wire import TIMEOUT
from tests.lab import host
from vdev.cli import main

from .conftest import VDEV, Run, Start, control_socket


@pytest.fixture
def serve(start: Start, disk: str):  # type: ignore[no-untyped-def]
    return lambda *more: start("blk", "serve", "--socket-path", "s", "--blk-file", disk, *more)


def test_status_as_json(serve, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    server = serve("--num-queues", "2", "--cache", "writethrough")
    with Session("s") as session:
        session.get_features()
        (status,) = json.loads(vdev("status", server.pid, "--json").stdout)
        (device,) = status["devices"]
        assert device["state"] == "connected"
        assert device["front_end_pid"] == os.getpid()
    assert status["version"]
    assert status["uptime_s"] >= 0
    assert device["image"]["path"] == os.path.abspath("disk.img")
    assert device["image"]["writeback"] is False
    assert len(device["stats"]["queues"]) == 2
    assert device["stats"]["total"]["requests"] == 0


def test_all_servers_are_found(serve, start: Start, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    pids = {serve().pid, start("blk", "serve", "--socket-path", "t", "--blk-file", "null:1M").pid}
    assert pids <= {server["pid"] for server in json.loads(vdev("status", "--json").stdout)}


def test_status_as_a_table(serve, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    result = vdev("status", serve().pid)
    assert result.returncode == 0
    for word in ("blk0", "waiting", "1MiB", "writeback"):
        assert word in result.stdout


def test_status_again_and_again(serve) -> None:  # type: ignore[no-untyped-def]
    server = serve()
    watch = subprocess.Popen(
        [*VDEV, "status", str(server.pid), "--json", "--watch", "0.01"], stdout=subprocess.PIPE
    )
    with watch:
        assert watch.stdout is not None
        for _ in range(3):
            assert json.loads(watch.stdout.readline())[0]["pid"] == server.pid
        watch.stdout.close()
        assert watch.wait(TIMEOUT) == 0


def test_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vdev.server.control.runtime_dir", lambda: tmp_path)
    assert main(["status"]) == 1
    assert "no server of this user runs" in capsys.readouterr().out


def test_resize(serve, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    server = serve()
    assert vdev("resize", server.pid, "blk0", "2MiB").returncode == 0
    assert os.stat("disk.img").st_size == 2 << 20
    with Session("s") as session:
        session.negotiate(session.get_features())
        assert int.from_bytes(session.get_config(0, 8), "little") == (2 << 20) // 512
    os.truncate("disk.img", 3 << 20)
    assert vdev("resize", server.pid, "blk0").stdout == f"blk0: {3 << 20} bytes\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["blk1"], "device 'blk1' is no block device of this server: blk0"),
        (["blk0", "512"], "would cut off data"),
        (["blk0", "64MB"], "is ambiguous"),
    ],
)
def test_resize_that_cannot_be(  # type: ignore[no-untyped-def]
    serve, refused: Callable[..., str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refused("resize", serve().pid, *arguments)


def test_link(start: Start, vdev: Run) -> None:
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    server = start("net", "serve", "--socket-path", "n", "--tap", "vdevlink0")
    for state in ("down", "up"):
        assert vdev("link", server.pid, "net0", state).returncode == 0
        (status,) = json.loads(vdev("status", server.pid, "--json").stdout)
        assert status["devices"][0]["link_up"] == (state == "up")
        flags = json.loads(subprocess.check_output(["ip", "-j", "link", "show", "vdevlink0"]))
        assert ("LOWER_UP" in flags[0]["flags"]) == (state == "up")


def test_link_of_a_disk(serve, refused: Callable[..., str]) -> None:  # type: ignore[no-untyped-def]
    complaint = refused("link", serve().pid, "blk0", "down")
    assert "device 'blk0' is no card of this server: " in complaint


def test_stop(serve, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    server = serve()
    assert vdev("stop", server.pid).returncode == 0
    assert server.process.wait(TIMEOUT) == 0
    assert not control_socket(server.pid).exists()


def test_a_control_socket_of_ones_own(serve, vdev: Run) -> None:  # type: ignore[no-untyped-def]
    server = serve("--control", "mine.ctl")
    assert not control_socket(server.pid).exists()
    assert json.loads(vdev("status", "./mine.ctl", "--json").stdout)[0]["pid"] == server.pid
