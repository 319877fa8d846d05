"""A guest's network cards: a plain one, and one of two queue pairs and a large MTU."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab.iperf import iperf, ping
from tests.lab.lab import Lab
from tests.lab.network import Network
from tests.lab.process import run
from tests.lab.qemu import Guest
from tests.lab.server import NetDevice, Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

_MTU = 9000
# IPv4 and ICMP headers of an echo request.
_PING_HEADERS = 28


@dataclass(frozen=True)
class Wires:
    """The booted guest and its two networks: eth0 on ``plain``, eth1 on ``large``."""

    server: Server
    guest: Guest
    plain: Network
    plain_nic: NetDevice
    large: Network
    large_nic: NetDevice
    directory: Path


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def wires(lab: Lab, networking: None) -> AsyncIterator[Wires]:
    root = lab.blk("net-root", await lab.root_image())
    plain, large = await lab.network(), await lab.network()
    eth0 = lab.net("net-plain", plain)
    eth1 = lab.net("net-large", large, mtu=_MTU, queues=2)
    async with (
        lab.serving(root, eth0, eth1) as server,
        lab.boot([root], [eth0, eth1]) as guest,
    ):
        yield Wires(server, guest, plain, eth0, large, eth1, lab.directory)


async def _link(name: str) -> dict[str, str]:
    (link,) = json.loads(await run("ip", "-json", "link", "show", name))
    return {key: str(value) for key, value in link.items()}


async def _ports(bridge: str) -> list[str]:
    links = json.loads(await run("ip", "-json", "link", "show", "master", bridge))
    return [link["ifname"] for link in links]


def _counter(interface: str, name: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/{name}").read_text())


async def test_ping(wires: Wires) -> None:
    for wire in (wires.plain, wires.large):
        result = await ping(wires.guest, wire.host, 20)
        assert result.received == result.sent == 20


async def test_mac_address_is_that_of_the_configuration(wires: Wires) -> None:
    seen = await wires.guest.run("cat /sys/class/net/eth0/address")
    assert seen.output.strip() == wires.plain_nic.mac


async def test_the_servers_tap_is_a_port_of_its_bridge(wires: Wires) -> None:
    for wire in (wires.plain, wires.large):
        assert len(await _ports(wire.bridge)) == 1


async def test_mtu_of_the_configuration_reaches_the_guest(wires: Wires) -> None:
    seen = await wires.guest.run("cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu")
    assert seen.output.split() == ["1500", str(_MTU)]
    assert (await _link(wires.large.bridge))["mtu"] == str(_MTU)


async def test_packets_of_the_whole_mtu_cross_in_one_piece(wires: Wires) -> None:
    for wire, mtu in ((wires.plain, 1500), (wires.large, _MTU)):
        options = f"-M do -s {mtu - _PING_HEADERS}"
        result = await ping(wires.guest, wire.host, 10, options=options)
        assert result.received == 10


async def test_checksum_and_segmentation_offloads_are_on(wires: Wires) -> None:
    listing = (await wires.guest.run("ethtool -k eth0")).output
    features = dict(line.split(": ", 1) for line in listing.splitlines() if ": " in line)
    for name in (
        "rx-checksumming",
        "tx-checksumming",
        "tcp-segmentation-offload",
        "tx-tcp6-segmentation",
    ):
        key = next(key for key in features if key.strip() == name)
        assert features[key].startswith("on"), name


async def test_tcp_from_guest_to_host_in_segments_larger_than_the_mtu(wires: Wires) -> None:
    (tap,) = await _ports(wires.plain.bridge)
    packets, octets = _counter(tap, "rx_packets"), _counter(tap, "rx_bytes")
    result = await iperf(wires.guest, wires.plain.host, wires.directory, seconds=2)
    assert result.received_bytes > 1 << 20
    packets, octets = _counter(tap, "rx_packets") - packets, _counter(tap, "rx_bytes") - octets
    assert octets / packets > 1514


async def test_tcp_from_host_to_guest_in_segments_larger_than_the_mtu(wires: Wires) -> None:
    (tap,) = await _ports(wires.plain.bridge)
    packets, octets = _counter(tap, "tx_packets"), _counter(tap, "tx_bytes")
    result = await iperf(wires.guest, wires.plain.host, wires.directory, seconds=2, reverse=True)
    assert result.received_bytes > 1 << 20
    packets, octets = _counter(tap, "tx_packets") - packets, _counter(tap, "tx_bytes") - octets
    assert octets / packets > 1514


async def test_two_queue_pairs_carry_traffic(wires: Wires) -> None:
    guest = wires.guest
    await guest.run("ethtool -L eth1 combined 2")
    assert "Combined:\t2" in (await guest.run("ethtool -l eth1")).output.replace(" ", "")
    for reverse in (False, True):
        result = await iperf(guest, wires.large.host, wires.directory, seconds=2, reverse=reverse)
        assert result.received_bytes > 1 << 20
    # The guest sends from the queue of the CPU that it is on.
    before = await wires.server.queue_stats(wires.large_nic.socket)
    for cpu in (0, 1):
        await guest.run(f"taskset -c {cpu} ping -q -c 20 -i 0.02 {wires.large.host}")
    after = await wires.server.queue_stats(wires.large_nic.socket)
    for transmit in (1, 3):
        assert after[transmit]["packets"] > before[transmit]["packets"]


@pytest.mark.parametrize("offloads", ["on", "off"])
async def test_a_stream_arrives_unchanged_both_ways(wires: Wires, offloads: str) -> None:
    guest, host = wires.guest, wires.plain.host
    await guest.run(f"ethtool -K eth0 tso {offloads} tx {offloads} gso {offloads} gro {offloads}")
    await guest.run("head -c 8M /dev/urandom >/tmp/sent")
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        content = await reader.readexactly(8 << 20)
        writer.write(content)
        await writer.drain()
        writer.close()
        received.set_result(content)

    server = await asyncio.start_server(echo, host)
    async with server:
        port = server.sockets[0].getsockname()[1]
        await guest.run(
            f"bash -c 'exec 3<>/dev/tcp/{host}/{port}; cat /tmp/sent >&3; cat <&3 >/tmp/back'"
        )
    sums = (await guest.run("sha256sum </tmp/sent; sha256sum </tmp/back")).output.split()
    assert sums[0] == sums[2] == hashlib.sha256(await received).hexdigest()
