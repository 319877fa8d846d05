"""Looking at interfaces and setting them, beside what ip(8) says."""

from __future__ import annotations

import errno
import os

import pytest

from vdev.net.rtnetlink import Link, TunInfo, find_link, set_link

from .namespace import Namespace

TAP = TunInfo(is_tap=True, packet_info=False, vnet_header=True, multi_queue=False)


def found(ns: Namespace, name: str) -> Link:
    link = ns.run(lambda: find_link(name=name))
    assert link is not None
    return link


@pytest.mark.parametrize(
    ("flags", "tun"),
    [
        ("mode tap vnet_hdr", TAP),
        ("mode tap multi_queue vnet_hdr", TAP._replace(multi_queue=True)),
        ("mode tap pi", TAP._replace(packet_info=True, vnet_header=False)),
        ("mode tun", TAP._replace(is_tap=False, vnet_header=False)),
    ],
)
def test_a_tap_says_what_it_is(ns: Namespace, flags: str, tun: TunInfo) -> None:
    ns.ip(f"tuntap add dev one {flags}")
    link = found(ns, "one")
    assert (link.name, link.kind, link.up, link.mtu, link.master) == ("one", "tun", False, 1500, 0)
    assert link.tun == tun
    assert ns.run(lambda: find_link(index=link.index)) == link


def test_what_is_no_tap_says_so(ns: Namespace) -> None:
    loopback = found(ns, "lo")
    assert (loopback.kind, loopback.tun, loopback.mtu) == (None, None, 65536)
    ns.ip("link add name br type bridge")
    assert found(ns, "br").kind == "bridge"


def test_nobody_is_none(ns: Namespace) -> None:
    assert ns.run(lambda: find_link(name="nobody")) is None
    assert ns.run(lambda: find_link(index=4711)) is None


def test_everything_is_set_at_once(ns: Namespace) -> None:
    ns.ip("tuntap add dev one mode tap")
    ns.ip("link add name br type bridge")
    tap, bridge = found(ns, "one"), found(ns, "br")
    mac = bytes.fromhex("020000000007")
    ns.run(lambda: set_link(tap.index, up=True, mtu=1400, master=bridge.index, address=mac))
    there = ns.link("one")
    assert there is not None
    assert (there["mtu"], there["master"], there["address"], "UP" in there["flags"]) == (
        *(1400, "br", "02:00:00:00:00:07", True),
    )
    assert found(ns, "one") == Link(tap.index, "one", True, 1400, bridge.index, "tun", tap.tun)


def test_one_thing_changes_nothing_else(ns: Namespace) -> None:
    ns.ip("tuntap add dev one mode tap")
    ns.ip("link add name br type bridge")
    tap, bridge = found(ns, "one"), found(ns, "br")
    ns.run(lambda: set_link(tap.index, up=True, mtu=1400, master=bridge.index))
    ns.run(lambda: set_link(tap.index, master=0))
    assert found(ns, "one") == Link(tap.index, "one", True, 1400, 0, "tun", tap.tun)
    ns.run(lambda: set_link(tap.index, up=False))
    assert found(ns, "one") == Link(tap.index, "one", False, 1400, 0, "tun", tap.tun)


def test_what_the_kernel_refuses_is_an_error(ns: Namespace) -> None:
    tap = found(ns, "lo")
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        ns.run(lambda: set_link(tap.index, mtu=1 << 31))
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        ns.run(lambda: set_link(4711, up=True))
