"""What a switch allows whom: VLANs, bound and private ports, limits, mirrors."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.frontend.net import GSO_NONE, HDR_F_NEEDS_CSUM, Header, NetClient
from vdev.errors import UserError
from vdev.net.fabric import PortSettings, parse_vlans
from vdev.server.switch_config import GuestConfig, PortConfig

from .frames import GSO, tcp_frame
from .switched import EVERYONE, Plug, Switched, mac, nothing_for, text, to


def tagged(frame: bytes, vlan: int, priority: int = 0) -> bytes:
    """With a tag (IEEE 802.1Q)."""
    return frame[:12] + struct.pack(">HH", 0x8100, priority << 13 | vlan) + frame[12:]


# ---- VLANs ----


def test_vlans_are_networks_of_their_own(sw: Switched, plug: Plug) -> None:
    a, b, c = (plug(port) for port in "abc")
    for port in "ab":
        sw.set(port, vlan=10)
    sent = to(1, EVERYONE)
    a.send(sent)
    assert b.recv().frame == sent
    nothing_for(sw, c)
    c.send(to(1, 2))  # the same address elsewhere is another station
    assert sw.table() == {(text(mac(1)), 10): "a", (text(mac(1)), 1): "c"}
    nothing_for(sw, a, b)


@pytest.mark.parametrize("payload", [46, 400])
def test_a_trunk_tags_what_an_access_port_does_not(sw: Switched, plug: Plug, payload: int) -> None:
    a, b, c = (plug(port) for port in "abc")
    sw.set("a", vlan=10)
    sw.set("b", vlan=20)
    sw.set("c", vlan=0, trunk="10,20-29")
    for card, number, vlan in ((a, 1, 10), (b, 2, 20)):
        sent = to(number, 3, payload)
        card.send(sent)
        assert c.recv().frame == tagged(sent, vlan)
        answer = to(3, number, payload)
        c.send(tagged(answer, vlan, priority=5))
        assert card.recv().frame == answer
    c.send(tagged(to(3, 1), 20))  # where it is not
    c.send(tagged(to(3, 1), 30))  # not in the trunk
    c.send(to(3, 1))
    assert sw.count("c", "drop_vlan") == 2
    assert b.recv().frame[:12] == mac(1) + mac(3)
    nothing_for(sw, a, b)


def test_between_trunks_a_tag_keeps_its_priority(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    sw.set("a", trunk="7")
    sw.set("b", trunk="all")
    for sent in (tagged(to(1, 2), 7, priority=6), to(1, 2)):
        a.send(sent)
        assert b.recv().frame == sent


def test_a_tag_of_priority_alone_is_taken_off(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    sent = to(1, 2)
    a.send(tagged(sent, 0, priority=7))
    assert b.recv().frame == sent


def test_an_access_port_takes_no_tags(sw: Switched, plug: Plug) -> None:
    """A guest does not get into a VLAN by saying that it is in it, its own included."""
    a, b = plug("a"), plug("b")
    sw.set("b", vlan=10)
    for vlan in (1, 10, 4095):
        a.send(tagged(to(1, 2), vlan))
    assert sw.count("a", "drop_vlan") == 3
    nothing_for(sw, b)
    inner = tagged(tagged(to(1, 2), 10), 0)
    a.send(inner)  # what is behind the first tag is data
    nothing_for(sw, b)


def test_a_port_that_leaves_its_vlan_is_looked_for_anew(sw: Switched, plug: Plug) -> None:
    a, b, c = (plug(port) for port in "abc")
    b.send(to(2, 1))
    a.recv(), c.recv()
    sw.set("b", vlan=10)
    assert sw.table() == {}
    a.send(to(1, 2))
    assert c.recv()
    nothing_for(sw, b)


@pytest.mark.parametrize("add", [True, False], ids=["added", "removed"])
def test_checksums_begin_later_behind_a_tag(sw: Switched, plug: Plug, add: bool) -> None:
    a, b = plug("a"), plug("b")
    sw.set("b" if add else "a", vlan=0, trunk="1")
    sent, header = tcp_frame(100), Header(HDR_F_NEEDS_CSUM, GSO_NONE, 0, 0, 34, 16)
    if add:
        a.send(sent, header)
    else:
        a.send(tagged(sent, 1), replace(header, csum_start=38))
    packet = b.recv()
    assert packet.frame == (tagged(sent, 1) if add else sent)
    assert packet.header.csum_start == (38 if add else 34)
    if add:
        a.send(tcp_frame(3000), GSO)
        packet = b.recv()
        assert (packet.header.csum_start, packet.header.hdr_len) == (38, 58)


def test_vlans_in_words() -> None:
    assert parse_vlans("") == set()
    assert parse_vlans("1, 3-5,4094") == {1, 3, 4, 5, 4094}
    assert parse_vlans("all") == set(range(1, 4095))
    for wrong in ("0", "4095", "5-3", "x", "1,,2", "1-", "٣"):
        with pytest.raises(UserError, match="trunk"):
            parse_vlans(wrong)


# ---- who may send ----


def test_a_bound_port_sends_from_its_own_address_alone(tmp_path: Path) -> None:
    settings = {"a": {"mac": text(mac(1)), "bound": True}}
    with (
        Switched(tmp_path, "a", "b", "c", settings=settings) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
        NetClient(tmp_path / "c") as c,
    ):
        for card in (a, b, c):
            card.post(8)
        assert a.config().mac == mac(1)
        a.send(to(2, EVERYONE))
        assert sw.count("a", "drop_spoofed") == 1
        b.send(to(1, EVERYONE))  # nor is it anywhere else
        assert sw.count("b", "drop_spoofed") == 1
        assert sw.table() == {(text(mac(1)), 1): "a"}
        sent = to(3, 1)
        c.send(sent)
        assert a.recv().frame == sent
        nothing_for(sw, a, b, c)
        sw.set("a", bound=False)
        b.send(to(1, EVERYONE))
        assert a.recv()
        assert c.recv()
        assert sw.table()[text(mac(1)), 1] == "b"


def test_private_ports_reach_uplinks_alone(tmp_path: Path) -> None:
    settings = {"a": {"private": True}, "b": {"private": True}, "up": {"uplink": True}}
    with (
        Switched(tmp_path, "a", "b", "c", "up", settings=settings) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
        NetClient(tmp_path / "c") as c,
        NetClient(tmp_path / "up") as up,
    ):
        for card in (a, b, c, up):
            card.post(8)
        sent = to(1, EVERYONE)
        a.send(sent)
        assert up.recv().frame == sent
        b.send(to(2, 1))
        c.send(to(3, 1))
        assert sw.count("b", "drop_filtered") == sw.count("c", "drop_filtered") == 1
        nothing_for(sw, a, b, c)
        answer = to(9, 1)
        up.send(answer)
        assert a.recv().frame == answer
        sent = to(3, EVERYONE)
        c.send(sent)
        assert up.recv().frame == sent
        nothing_for(sw, a, b)


# ---- limits ----


def test_a_port_sends_no_more_than_its_rate(sw: Switched, plug: Plug) -> None:
    """One byte a second: what passes is the burst."""
    a, b = plug("a"), plug("b", buffers=20)
    sw.set("a", rate=1, burst=3500)
    for _ in range(10):
        a.send(to(1, 2, 1000 - 14))
    assert sw.count("a", "drop_rate") == 7
    assert [len(b.recv().frame) for _ in range(3)] == [1000] * 3
    nothing_for(sw, b)


def test_a_storm_is_cut_off_and_what_is_known_is_not(sw: Switched, plug: Plug) -> None:
    a, b = plug("a", buffers=20), plug("b", buffers=40)
    b.send(to(2, 1))
    assert a.recv()
    sw.set("a", storm=1)
    for _ in range(20):
        a.send(to(1, EVERYONE))
    dropped = sw.count("a", "drop_storm")
    assert 0 < dropped < 20
    for _ in range(20 - dropped):
        assert b.recv().frame[:6] == EVERYONE
    for _ in range(10):
        sent = to(1, 2)
        a.send(sent)
        assert b.recv().frame == sent


# ---- mirrors ----


def test_a_mirror_gets_what_crosses_the_mirrored_ports(sw: Switched, plug: Plug) -> None:
    a, b, c = (plug(port) for port in "abc")
    sw.set("c", mirror=True)
    sw.set("a", mirrored=True)
    there, back = to(1, 2), to(2, 1)
    a.send(there)
    assert b.recv().frame == c.recv().frame == there
    b.send(back)
    assert a.recv().frame == c.recv().frame == back
    b.send(to(2, 7))  # flooded, to a among others
    assert a.recv().frame == c.recv().frame
    c.send(to(3, 1))
    assert sw.count("c", "drop_down") == 1
    nothing_for(sw, a, b, c)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"vlan": 4095}, "1 to 4094"),
        ({"bound": True}, "needs the mac"),
        ({"mac": "01:00:00:00:00:01"}, "a group's"),
        ({"trunk": "1-5000"}, "no range"),
        ({"rate": -1}, "0 or more"),
        ({"stations": 1 << 30}, "at most"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        PortSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "needs a socket"),
        ({"socket": "s", "tap": "t"}, "not both"),
        ({"socket": "s", "address": "10.0.0.1/24"}, "goes with a tap"),
        ({"tap": "t", "queues": 2}, "a tap's 1"),
        ({"socket": "s", "mtu": 67}, "68 to 65535"),
        ({"socket": "s", "name": "a b"}, "letters"),
    ],
)
def test_ports_that_cannot_be(config: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        PortConfig(**{"name": "p", **config})  # type: ignore[arg-type]


def test_guests_have_addresses_of_their_own() -> None:
    with pytest.raises(UserError, match="cannot share one mac"):
        GuestConfig(mac="02:00:00:00:00:01")
