"""A card's server is replaced under traffic: no frame is lost, and its wiring stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.net import FEATURES, NetClient
from tests.frontend.replaced import Replaced, Upgrading, failing
from tests.frontend.session import F_RING_PACKED
from tests.frontend.wire import Request, u64
from tests.lab import host
from tests.net.frames import GUEST, HOST, frame
from tests.net.namespace import Namespace, PacketPort
from tests.net.test_program import journals
from tests.net.test_wiring import settled
from vdev.errors import UserError
from vdev.server.control import request

UPGRADES = 20


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    with Namespace() as namespace:
        yield namespace


def serving(ns: Namespace, path: Path, *options: str) -> Replaced:
    argv = (sys.executable, "-m", "vdev", "net", "serve", "--socket-path", str(path), *options)
    return Replaced(ns.argv(*argv))


def mtu(ns: Namespace) -> int:
    found = ns.link("tap0")
    assert found is not None
    return int(found["mtu"])


def check_traffic(nic: NetClient, wire: PacketPort, *, pair: int = 0) -> None:
    """A frame each way, the whole of it."""
    sent = frame(source=HOST, to=GUEST)
    nic.post(1, pair=pair)
    wire.send(sent)
    assert nic.recv(pair=pair).frame == sent
    out = frame()
    nic.send(out, pair=pair)
    assert wire.recv() == out


@pytest.mark.parametrize(
    "features",
    [
        pytest.param(FEATURES, id="split", marks=pytest.mark.long),
        pytest.param(FEATURES | F_RING_PACKED, id="packed"),
    ],
)
def test_again_and_again_under_traffic(ns: Namespace, tmp_path: Path, features: int) -> None:
    with serving(ns, tmp_path / "s", "--tap", "tap0") as server:
        with NetClient(tmp_path / "s", features=features) as nic, ns.port("tap0") as wire:
            server.upgrade()
            before = server.fds(), server.shared_maps()
            upgrading = Upgrading(server, UPGRADES)
            frames = 0
            while upgrading.left and upgrading.is_alive():
                check_traffic(nic, wire)
                frames += 1
            upgrading.check()
            check_traffic(nic, wire)
            assert frames > UPGRADES
            assert (server.fds(), server.shared_maps()) == before
        assert server.output == ""
        assert server.terminate_last() == 0
    assert ns.names() == set()


def test_what_was_made_is_undone_by_the_last(ns: Namespace, tmp_path: Path) -> None:
    ns.ip("link add br8 type bridge")
    made = ("--bridge", "br7", "--address", "10.1.0.1/24")
    other = ("--bridge", "br8", "--address", "10.8.0.1/24")
    before = ns.addresses("br8")
    with serving(ns, tmp_path / "a", *made) as first, serving(ns, tmp_path / "b", *other) as second:
        names = ns.names()
        for server in (first, second, first):
            server.upgrade()
        assert ns.names() == names
        assert ns.addresses("br7") == ["10.1.0.1/24"]
        assert len(journals(ns)) == 2
        assert first.terminate_last() == 0
        assert "br7" not in ns.names()
        assert second.terminate_last() == 0
    assert ns.names() == {"br8"}
    assert ns.addresses("br8") == before
    assert journals(ns) == []


def test_a_tap_of_the_users_is_put_back_by_the_last(ns: Namespace, tmp_path: Path) -> None:
    ns.ip("tuntap add dev tap7 mode tap")
    before = settled(ns.link("tap7"))
    with serving(ns, tmp_path / "s", "--tap", "tap7", "--mtu", "2000") as server:
        with NetClient(tmp_path / "s") as nic, ns.port("tap7") as wire:
            server.upgrade()
            assert nic.config().mtu == 2000
            check_traffic(nic, wire)
        server.terminate_last()
    assert settled(ns.link("tap7")) == before


def test_what_a_front_end_and_a_user_have_set(ns: Namespace, tmp_path: Path) -> None:
    """Its MTU goes on, and goes with it; the cable stays pulled, whether there is one or not."""
    with serving(ns, tmp_path / "s", "--tap", "tap0", "--mtu", "2000") as server:
        with NetClient(tmp_path / "s") as nic:
            nic.do(Request.NET_SET_MTU, u64(1300))
            server.upgrade()
            assert (mtu(ns), nic.config().mtu) == (1300, 1300)
            request(server.control, "link", device="net0", up=False)
            server.upgrade()
            assert (nic.config().mtu, nic.config().status) == (1300, 0)
        server.upgrade()
        with NetClient(tmp_path / "s") as nic:
            assert (mtu(ns), nic.config().mtu) == (2000, 2000)
            assert nic.config().status == 0
            request(server.control, "link", device="net0", up=True)
            assert nic.config().status == 1


def test_several_queues(ns: Namespace, tmp_path: Path) -> None:
    """Those that are attached stay, those that are not too."""
    with (
        serving(ns, tmp_path / "s", "--tap", "tap0", "--queues", "3") as server,
        NetClient(tmp_path / "s", pairs=3, enable=False) as nic,
        ns.port("tap0") as wire,
    ):
        for ring in range(4):
            nic.enable(ring)
        server.upgrade()
        for pair in range(2):
            out = frame()
            nic.send(out, pair=pair)
            assert wire.recv() == out
        nic.enable(4)
        nic.enable(5)
        nic.enable(2, False)
        server.upgrade()
        out = frame()
        nic.send(out, pair=2)
        assert wire.recv() == out


@pytest.mark.parametrize("step", ["ready", "prepared", "serving"])
@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_successor_that_fails(ns: Namespace, tmp_path: Path, step: str, how: str) -> None:
    """It undoes nothing."""
    options = ("--bridge", "br7", "--address", "10.1.0.1/24")
    with (
        serving(ns, tmp_path / "s", *options) as server,
        NetClient(tmp_path / "s") as nic,
        ns.port("br7") as wire,
    ):
        before = ns.names()
        with pytest.raises(UserError, match="this server goes on"):
            server.upgrade(program=failing(tmp_path, step, how))
        assert ns.names() == before
        assert ns.addresses("br7") == ["10.1.0.1/24"]
        out = frame(to=b"\xff" * 6)
        nic.send(out)
        assert wire.recv() == out
        assert server.stop() == 0
    assert ns.names() == set()
