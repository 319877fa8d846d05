"""The net device beside its frames: features, config space, MTU, RARP, link, MAC addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.net import F_MQ, F_MTU, FEATURES, NetClient
from tests.frontend.session import PROTOCOL_WANTED, Refused, Session
from tests.frontend.wire import Protocol, Request, u64
from vdev.errors import PeerError, UserError
from vdev.net.card import parse_mac, stable_mac
from vdev.virtio.vhost_user.state import decode_state, encode_state

from .namespace import Namespace
from .served import Served

MAC = "52:54:00:12:34:56"
F_CTRL_VQ = 1 << 17


@pytest.fixture
def card(ns: Namespace, tmp_path: Path) -> Iterator[Served]:
    with Served(ns, tmp_path / "s", tap="tap0", mac=MAC, mtu=1400) as served:
        yield served


@pytest.fixture
def nic(card: Served) -> Iterator[NetClient]:
    with NetClient(card.path) as client:
        yield client


def test_all_features_of_the_plan_are_offered(card: Served) -> None:
    assert card.device.features & FEATURES & ~F_MQ == FEATURES & ~F_MQ & ~(1 << 30)
    assert not card.device.features & F_MQ


def test_features_that_need_an_option(ns: Namespace, tmp_path: Path) -> None:
    with Served(ns, tmp_path / "s", tap="tap0", queues=2) as card:
        assert not card.device.features & F_MTU
        assert card.device.features & F_MQ
        with NetClient(card.path, pairs=2) as nic:
            assert nic.config().mtu == 0
            assert nic.config().max_pairs == 2


@pytest.mark.parametrize("queues", [1, 2])
def test_what_comes_with_several_pairs(ns: Namespace, tmp_path: Path, queues: int) -> None:
    """MQ requires CTRL_VQ (virtio 1.3, 5.1.3.1); one pair is not worth asking for its number."""
    with (
        Served(ns, tmp_path / "s", tap="tap0", queues=queues) as card,
        Session(card.path) as front_end,
    ):
        features = front_end.get_features()
        assert bool(features & F_MQ) == bool(features & F_CTRL_VQ) == (queues > 1)
        offered = front_end.get_protocol_features()
        assert bool(offered & Protocol.MQ) == (queues > 1)


@pytest.mark.parametrize("queues", [1, 2])
def test_memory_slots_where_front_ends_can_use_them(
    ns: Namespace, tmp_path: Path, queues: int
) -> None:
    """QEMU up to 7.2 adds each region once a queue pair."""
    with (
        Served(ns, tmp_path / "s", tap="tap0", queues=queues) as card,
        Session(card.path) as front_end,
    ):
        offered = front_end.get_protocol_features()
        assert bool(offered & Protocol.CONFIGURE_MEM_SLOTS) == (queues == 1)


def test_the_config_space(nic: NetClient) -> None:
    config = nic.config()
    assert config.mac == bytes.fromhex(MAC.replace(":", ""))
    assert (config.status, config.max_pairs, config.mtu) == (1, 1, 1400)


def test_no_field_may_be_written(nic: NetClient) -> None:
    before = nic.config()
    with pytest.raises(Refused):
        nic.set_config(0, bytes(6))
    assert nic.config() == before


def test_the_link_may_go_down_and_up(card: Served, nic: NetClient) -> None:
    told: list[int] = []
    card.device.config_changed.append(lambda: told.append(card.device.config()[6]))
    for up in (False, False, True):
        card.call(lambda up=up: card.device.set_link(up))  # type: ignore[misc]
        assert nic.config().status == int(up)
    assert told == [0, 1]


def test_the_link_s_state_moves_with_the_card(card: Served) -> None:
    device = card.device
    card.call(lambda: device.set_link(False))
    state = encode_state(device)
    card.call(lambda: device.set_link(True))
    for bad in (
        {"link_up": 1},
        {"link_up": True, "more": 0},
        {"writeback": True},
        {"mtu": "1500"},
        {"mtu": True},
    ):
        with pytest.raises(ValueError, match="not the state of a network card"):
            device.restore(bad)
    assert device.link_up
    with pytest.raises(PeerError, match="MTU 67"):
        card.call(lambda: device.restore({"link_up": False, "mtu": 67}))
    assert device.link_up
    card.call(lambda: decode_state(device, state))
    assert not device.link_up


@pytest.mark.parametrize("mtu", [0, 67, 65536, 1 << 32])
def test_an_mtu_out_of_range_is_refused(ns: Namespace, nic: NetClient, mtu: int) -> None:
    """Case 40."""
    with pytest.raises(Refused):
        nic.do(Request.NET_SET_MTU, u64(mtu))
    link = ns.link("tap0")
    assert link is not None
    assert link["mtu"] == 1400


@pytest.mark.parametrize(("mtu", "becomes"), [(68, 68), (9000, 9000), (65535, 65521)])
def test_an_mtu_is_the_tap_s(ns: Namespace, nic: NetClient, mtu: int, becomes: int) -> None:
    nic.do(Request.NET_SET_MTU, u64(mtu))
    link = ns.link("tap0")
    assert link is not None
    assert link["mtu"] == becomes


def test_a_rarp_in_the_guest_s_name(ns: Namespace, card: Served) -> None:
    mac = bytes.fromhex("020000000009")
    wanted = PROTOCOL_WANTED | Protocol.RARP
    with ns.port("tap0") as wire, NetClient(card.path, protocol=wanted) as nic:
        nic.do(Request.SEND_RARP, mac + bytes(2))
        frame = wire.recv()
    assert frame[:14] == b"\xff" * 6 + mac + b"\x80\x35"
    # RFC 903: hardware Ethernet, protocol IPv4, request reverse, both addresses the guest's.
    assert frame[14:] == bytes.fromhex("0001 0800 06 04 0003") + (mac + bytes(4)) * 2 + bytes(18)


@pytest.mark.parametrize(
    "text", ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "no:54:00:12:34:56", "525400123456"]
)
def test_what_is_no_mac(text: str) -> None:
    with pytest.raises(UserError, match="six bytes"):
        parse_mac(text)


@pytest.mark.parametrize("text", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"])
def test_a_mac_of_no_station(text: str) -> None:
    with pytest.raises(UserError, match="MAC address"):
        parse_mac(text)


def test_a_default_mac_stays_the_same() -> None:
    assert stable_mac("tap0") == stable_mac("tap0") != stable_mac("tap1")
    assert stable_mac("tap0")[0] & 3 == 2
