"""The net front-end and the native packet driver, through vdev's taps and bridge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import servers
from perf.frontend.connection import RING_EVENT_IDX, RING_IN_ORDER, RING_PACKED
from perf.frontend.net import NetFrontend, PacketOutcome, plain, run, segments
from perf.loads.net import LARGEST, MACS, served_ports
from perf.model import Place, Port, Unsupported
from perf.servers.vdev import BRIDGE
from tests.lab import host

PATIENCE_MS = 20_000
LAYOUTS = {"split": RING_EVENT_IDX, "packed": RING_EVENT_IDX | RING_PACKED}
OTHER_RINGS = {
    "plain": 0,
    "packed": RING_PACKED,
    "in_order": RING_IN_ORDER,
    "in_order_event_idx": RING_IN_ORDER | RING_EVENT_IDX,
    "packed_in_order": RING_PACKED | RING_IN_ORDER,
    "packed_in_order_event_idx": RING_PACKED | RING_IN_ORDER | RING_EVENT_IDX,
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Port]]:
    """Two cards of one vdev on one bridge, in a network namespace of the server's own."""
    lacks = host.lacks_network()
    if lacks:
        pytest.skip(lacks)
    place = Place(0, 1, tmp_path_factory.mktemp("net"))
    with served_ports(servers.find("vdev"), place, segmented=True) as (_, ports):
        yield ports


def sent(
    ports: list[Port],
    size: int,
    *,
    features: int,
    round_trip: bool,
    poll: bool,
    packets: int = 2000,
) -> PacketOutcome:
    segmented = size > LARGEST
    there, back = (
        segments(source, target, size) if segmented else plain(source, target)
        for source, target in (MACS, MACS[::-1])
    )
    with (
        NetFrontend(ports[0].socket, there, segmented=segmented, features=features) as source,
        NetFrontend(ports[1].socket, back, segmented=segmented, features=features) as target,
    ):
        for frontend in (source, target):
            taken = frontend.frontend.features
            assert taken & (RING_EVENT_IDX | RING_PACKED | RING_IN_ORDER) == features
        # The bridge learns where the target is.
        run(target, source, size=size, depth=1, packets=4, poll=poll)
        return run(
            *(source, target),
            size=size,
            depth=32,
            packets=packets,
            round_trip=round_trip,
            verify=True,
            poll=poll,
            lost_ms=PATIENCE_MS,
        )


@pytest.mark.parametrize("poll", [False, True], ids=["sleeping", "polling"])
@pytest.mark.parametrize("round_trip", [False, True], ids=["one way", "there and back"])
@pytest.mark.parametrize("size", [64, LARGEST, 65000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_arrives(
    network: list[Port], layout: str, size: int, round_trip: bool, poll: bool
) -> None:
    features = LAYOUTS[layout]
    outcome = sent(network, size, features=features, round_trip=round_trip, poll=poll)
    assert outcome.sent == 2000
    assert (outcome.received, outcome.lost, outcome.corrupt) == (2000, 0, 0)
    assert outcome.bytes == 2000 * size
    assert sum(outcome.latency) == 2000


@pytest.mark.parametrize("poll", [False, True], ids=["sleeping", "polling"])
@pytest.mark.parametrize("size", [64, 65000])  # of one receive buffer, and of many
@pytest.mark.parametrize("ring", OTHER_RINGS)
def test_every_byte_arrives_on_other_rings(
    network: list[Port], ring: str, size: int, poll: bool
) -> None:
    features = OTHER_RINGS[ring]
    outcome = sent(network, size, features=features, round_trip=True, poll=poll, packets=500)
    assert (outcome.received, outcome.lost, outcome.corrupt) == (500, 0, 0)


def test_the_servers_network_is_its_own(network: list[Port]) -> None:
    assert BRIDGE not in os.listdir("/sys/class/net")


def test_segments_are_refused_where_the_server_cannot_pass_them_on(tmp_path: Path) -> None:
    port = Port(tmp_path / "s", MACS[0], segmented=True)
    with pytest.raises(Unsupported, match="segments"):
        servers.find("testpmd").net([port, port], tmp_path)
