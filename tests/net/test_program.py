"""`vdev net serve` as a program: crashes, and mistakes of users."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.frontend.net import NetClient
from tests.frontend.server import Server
from vdev.runtime import runtime_dir

from .frames import frame
from .namespace import Namespace
from .test_wiring import settled

VDEV = (sys.executable, "-m", "vdev", "net", "serve")


def journals(ns: Namespace) -> list[Path]:
    """The journals of this namespace; other servers of this host have theirs."""
    ours = []
    for path in runtime_dir().glob("net-*.json"):
        with contextlib.suppress(FileNotFoundError):
            if str(os.fstat(ns.fd).st_ino) in path.read_text():
                ours.append(path)
    return ours


def refused(ns: Namespace, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """The one line that the program says before it ends with exit code 2."""
    done = subprocess.run(
        ns.argv(*prefix, *VDEV, *arguments), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("vdev: ")
    return line


def test_a_server_killed_and_started_again(ns: Namespace, tmp_path: Path) -> None:
    """What the dead one left is undone, and the new one serves as if nothing had been."""
    ns.ip("tuntap add dev tap7 mode tap")
    ns.ip("link add br8 type bridge")
    before = {"tap7": settled(ns.link("tap7")), "br8": ns.addresses("br8")}
    path = tmp_path / "s"
    argv = [*VDEV, "--socket-path", str(path)]
    bridged = [*argv, "--bridge", "br7", "--address", "10.1.0.1/24"]

    for options in (
        ["--tap", "tap7", "--mtu", "2000"],
        ["--bridge", "br8", "--address", "10.8.0.1/24"],
    ):
        with Server(ns.argv(*argv, *options)) as server:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
    with Server(ns.argv(*bridged)) as server, NetClient(path) as nic:
        assert settled(ns.link("tap7")) == before["tap7"]
        assert ns.addresses("br8") == before["br8"]
        nic.send(frame())
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert "br7" in ns.names()
    assert len(journals(ns)) == 1
    with Server(ns.argv(*bridged)) as server:
        assert len(ns.names()) == 4
        assert ns.addresses("br7") == ["10.1.0.1/24"]
        with NetClient(path) as nic, ns.port("br7") as port:
            sent = frame(to=b"\xff" * 6)
            nic.send(sent)
            assert port.recv() == sent
        assert server.stop() == 0
    assert ns.names() == {"tap7", "br8"}
    assert journals(ns) == []
    assert not path.exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(ns: Namespace, tmp_path: Path, kind: signal.Signals) -> None:
    path = tmp_path / "s"
    argv = ns.argv(*VDEV, "--socket-path", str(path), "--bridge", "br7")
    with Server(argv) as server, NetClient(path) as nic:
        nic.post(4)
        server.process.send_signal(kind)
        assert server.process.wait(30) == 0
    assert ns.names() == set()
    assert not path.exists()


def test_servers_of_one_bridge_come_and_go_at_once(ns: Namespace, tmp_path: Path) -> None:

    def run(number: int) -> None:
        argv = ns.argv(*VDEV, "--socket-path", str(tmp_path / f"s{number}"), "--bridge", "br7")
        for kind in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            with Server(argv) as server:
                assert "br7" in ns.names()
                server.process.send_signal(kind)
                server.process.wait(30)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert ns.names() == set()
    assert journals(ns) == []


def test_mistakes_are_one_line_and_leave_nothing(ns: Namespace, tmp_path: Path) -> None:
    socket = ("--socket-path", str(tmp_path / "s"))
    ns.ip("tuntap add dev x0 mode tun")
    assert "no bridge" in refused(ns, *socket, "--bridge", "x0")
    assert "no tap" in refused(ns, *socket, "--tap", "x0")
    assert "at most 15" in refused(ns, *socket, "--bridge", "a-name-of-16-chr")
    assert "MAC address" in refused(ns, *socket, "--bridge", "br7", "--mac", "01:00:00:00:00:00")
    assert "s: " in refused(ns, "--socket-path", str(tmp_path / "no" / "s"), "--bridge", "br7")
    assert ns.names() == {"x0"}
    assert journals(ns) == []
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("option", ["--tap", "--bridge"])
def test_without_cap_net_admin(ns: Namespace, tmp_path: Path, option: str) -> None:
    without = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    line = refused(ns, "--socket-path", str(tmp_path / "s"), option, "x7", prefix=without)
    assert "CAP_NET_ADMIN is lacking" in line
    assert ns.names() == set()
    assert not (tmp_path / "s").exists()
