"""A card's cable is pulled and plugged, and its MTU set: what the host and a front-end see."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import wire as protocol
from tests.frontend.net import F_MTU, NetClient
from tests.frontend.wire import NEED_REPLY, Request, Wire, u64
from vdev._native import ffi, lib
from vdev.virtio.vhost_user.remote import VhostUserDevice

from .namespace import Namespace
from .served import Served

CONFIG_CHANGE = 2
STATUS: int = ffi.offsetof("struct virtio_net_config", "status")


@pytest.fixture
def card(ns: Namespace, tmp_path: Path) -> Iterator[Served]:
    with Served(ns, tmp_path / "s", tap="tap0", mtu=1400) as served:
        yield served


def carrier(ns: Namespace) -> bool:
    link = ns.link("tap0")
    assert link is not None
    return "LOWER_UP" in link["flags"]


def mtu(ns: Namespace) -> int:
    link = ns.link("tap0")
    assert link is not None
    return int(link["mtu"])


def test_the_front_end_is_told_over_its_channel(ns: Namespace, card: Served) -> None:
    ours, theirs = socket.socketpair()
    with NetClient(card.path) as nic, Wire(ours) as channel:
        with theirs:
            nic.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        for up in (False, True, False):
            card.call(lambda up=up: card.device.set_link(up))  # type: ignore[misc]
            message = channel.recv()
            assert message.request == CONFIG_CHANGE
            if message.flags & NEED_REPLY:
                channel.send(CONFIG_CHANGE, u64(0), flags=protocol.VERSION | protocol.REPLY)
            assert nic.config().status == int(up)
            assert carrier(ns) == up
    # The cable is the host's business: another driver finds it as it is.
    with NetClient(card.path) as nic:
        assert nic.config().status == 0


async def test_our_own_front_end_passes_it_on(ns: Namespace, card: Served) -> None:
    changed = asyncio.Event()
    device = await VhostUserDevice.connect(card.path, device_id=lib.VIRTIO_ID_NET, num_queues=2)
    try:
        device.config_changed.append(changed.set)
        for up in (False, True):
            changed.clear()
            await asyncio.to_thread(card.call, lambda up=up: card.device.set_link(up))  # type: ignore[misc]
            await asyncio.wait_for(changed.wait(), protocol.TIMEOUT)
            assert device.config()[STATUS] == int(up)
    finally:
        device.close()


def test_a_tap_that_is_gone(ns: Namespace, card: Served) -> None:
    ns.ip("link delete tap0")
    with pytest.raises(OSError, match="bad state"):
        card.call(lambda: card.device.set_link(False))
    assert card.device.link_up


def test_a_front_end_s_mtu_goes_with_it(ns: Namespace, card: Served) -> None:
    assert mtu(ns) == 1400
    with NetClient(card.path) as nic:
        assert nic.features & F_MTU
        nic.do(Request.NET_SET_MTU, u64(9000))
        nic.do(Request.NET_SET_MTU, u64(1300))
        assert (mtu(ns), nic.config().mtu) == (1300, 1300)
    with NetClient(card.path) as nic:
        assert (mtu(ns), nic.config().mtu) == (1400, 1400)
