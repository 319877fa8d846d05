"""A switch as a program: served, asked, changed, killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.net import FEATURES, NetClient
from tests.frontend.ring import split
from tests.frontend.wire import Wire
from tests.net.switched import EVERYONE, mac, text, to
from vdev.runtime import runtime_dir, switch_socket

from .conftest import Run, Start

NAME = f"test-{os.getpid()}"


def ports_of(vdev: Run, name: str = NAME) -> dict[str, Any]:
    return {
        port["name"]: port for port in json.loads(vdev("switch", "ports", name, "--json").stdout)
    }


def test_a_switch_from_its_start_to_its_end(start: Start, vdev: Run) -> None:
    server = start("switch", "serve", NAME, "--port", "db,socket=db.sock,vlan=1,private")
    path = switch_socket(NAME)
    (found,) = (s for s in json.loads(vdev("switch", "list", "--json").stdout) if s["name"] == NAME)
    assert found["pid"] == server.pid
    assert found["socket"] == str(path)
    assert found["ports"] == 1
    with NetClient(path) as a, NetClient(path) as b:
        b.post(4)
        sent = to(1, EVERYONE)
        a.send(sent)
        assert b.recv().frame == sent
        ports = ports_of(vdev)
        assert set(ports) == {"db", "guest0", "guest1"}
        assert ports["guest0"]["counters"]["in_frames"] == 1
        assert ports["guest0"]["front_end_pid"] == os.getpid()
        assert ports["db"]["settings"]["private"] is True
        (station,) = json.loads(vdev("switch", "table", NAME, "--json").stdout)
        assert (station["mac"], station["port"]) == (text(mac(1)), "guest0")
        table = vdev("switch", "table", NAME).stdout
        assert text(mac(1)) in table
        listing = vdev("switch", "ports", NAME).stdout
        assert "guest1" in listing
        assert "private" in listing
        assert f"switch {NAME}" in vdev("status", NAME).stdout
    assert vdev("stop", NAME).returncode == 0
    assert server.process.wait() == 0
    assert not path.exists()
    assert not Path("db.sock").exists()


def test_ports_come_change_and_go(start: Start, vdev: Run) -> None:
    start("switch", "serve", NAME)
    assert vdev("switch", "add", NAME, "web,socket=web.sock,trunk=10,,20-29").returncode == 0
    assert Path("web.sock").is_socket()
    assert vdev("switch", "set", NAME, "web", "vlan=20,storm=100,rate=10M").returncode == 0
    settings = ports_of(vdev)["web"]["settings"]
    assert (settings["vlan"], settings["trunk"]) == (20, "10,20-29")
    assert (settings["storm"], settings["rate"]) == (100, 10 << 20)
    assert vdev("link", switch_control(vdev), "web", "down").returncode == 0
    assert ports_of(vdev)["web"]["link_up"] is False
    assert vdev("switch", "remove", NAME, "web").returncode == 0
    assert not Path("web.sock").exists()
    assert ports_of(vdev) == {}


def switch_control(vdev: Run) -> str:
    (found,) = (s for s in json.loads(vdev("switch", "list", "--json").stdout) if s["name"] == NAME)
    return str(runtime_dir() / f"{NAME}.{found['pid']}.sock")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["add", NAME, "x"], "needs a socket"),
        (["add", NAME, "x,socket=s,vlan=5000"], "vlan 5000: 1 to 4094"),
        (["add", NAME, "x,socket=s,color=red"], "unknown key 'color'"),
        (["set", NAME, "x", "vlan=2"], "port 'x' does not exist"),
        (["set", NAME, "db", "vlan=two"], "must be a whole number"),
        (["set", NAME, "db", "socket=t"], "unknown key 'socket'"),
        (["remove", NAME, "x"], "port 'x' does not exist: db"),
        (["table", "nobody"], "no server answers there"),
        (["serve", NAME], "one of that name runs already"),
        (["serve"], "give the switch a name"),
        (["serve", "a/b"], "switch 'a/b'"),
        (["serve", f"{NAME}x", "--guests", "mac=02:00:00:00:00:01"], "cannot share one mac"),
        (["serve", f"{NAME}x", "--age", "0"], "age 0"),
    ],
    ids=lambda value: " ".join(value[::2]) if isinstance(value, list) else "",
)
def test_mistakes_are_a_line(start: Start, vdev: Run, arguments: list[str], why: str) -> None:
    start("switch", "serve", NAME, "--port", "db,socket=db.sock")
    result = vdev("switch", *arguments)
    assert result.returncode == 2, result.stderr
    assert why in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_switch_from_a_file(start: Start, vdev: Run, folder: Path) -> None:
    Path("lan.toml").write_text(
        f"""
        name = "{NAME}"
        socket = "lan.sock"
        age = 60
        [guests]
        vlan = 10
        [[port]]
        name = "router"
        socket = "router.sock"
        trunk = "10,20"
        vlan = 0
        """
    )
    start("switch", "serve", "--config", "lan.toml")
    with NetClient("lan.sock") as guest, NetClient("router.sock") as router:
        router.post(1)
        sent = to(1, 2)
        guest.send(sent)
        assert router.recv().frame == sent[:12] + b"\x81\x00\x00\x0a" + sent[12:]
    bad = vdev("switch", "serve", "--config", "lan.toml", "--port", "x,socket=y")
    assert "describes the whole switch" in bad.stderr
    Path("bad.toml").write_text('[[port]]\nname = "x"\nvlan = "1"\n')
    bad = vdev("switch", "serve", "--config", "bad.toml")
    assert 'bad.toml: [[port]] number 1: vlan = "1": must be a whole number' in bad.stderr


def go_on(card: NetClient, path: str) -> None:
    """Connects the card to who serves there now, with its rings as they stand."""
    card.wire.wait_closed()
    card.wire.close()
    card.wire = Wire.connect(path)
    card.features = card.protocol = 0
    card.negotiate(FEATURES)
    card.share(card.memory)
    for index, ring in enumerate(card.rings):
        card.start_ring(index, ring, base=split(ring).used_idx)
    card.driver_ok()
    card.barrier()


def test_a_killed_switch_is_followed_by_another(start: Start, vdev: Run) -> None:
    """Front-ends connect again, and go on with their rings where these stand."""
    arguments = ("switch", "serve", NAME, "--port", "a,socket=a.sock", "--port", "b,socket=b.sock")
    server = start(*arguments)
    with NetClient("a.sock") as a, NetClient("b.sock") as b:
        b.post(8)
        for _ in range(3):
            sent = to(1, 2)
            a.send(sent)
            assert b.recv().frame == sent
        server.process.kill()
        server.process.wait()
        start(*arguments)
        go_on(a, "a.sock")
        go_on(b, "b.sock")
        for _ in range(3):
            sent = to(1, 2)
            a.send(sent)
            assert b.recv().frame == sent
