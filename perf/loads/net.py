"""Network load by the native packet driver: from one port of a server to another, no guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from perf.frontend.connection import RING_EVENT_IDX, by_floor, percentile
from perf.frontend.net import NetFrontend, plain, run, segments
from perf.loads.target import WARM_UP_SECONDS, ServerTarget
from perf.model import Place, Port, Sample, Server, Target
from perf.process import Started
from perf.serving import serving

MACS = ("52:54:00:aa:00:01", "52:54:00:aa:00:02")
MTU = 1500
LARGEST = MTU + 14  # of a frame that is not cut


@contextlib.contextmanager
def served_ports(
    server: Server, place: Place, *, segmented: bool
) -> Iterator[tuple[Started, list[Port]]]:
    """The server with two ports that reach each other."""
    ports = [
        Port(place.directory / f"port{number}", mac, segmented=segmented)
        for number, mac in enumerate(MACS)
    ]
    launch = server.net(ports, place.directory)
    with serving(server.name, launch, [port.socket for port in ports], place) as started:
        yield started, ports


@dataclass(frozen=True)
class NativeNet:
    """Frames of `size` bytes (all headers counted), `depth` of them in flight.

    Frames above the MTU are TCP segments for the receiver to cut. `round_trip`: each comes back.
    `features`: of the rings; only servers that offer the layout and order among them take part.
    """

    size: int
    depth: int
    round_trip: bool = False
    verify: bool = False
    features: int = RING_EVENT_IDX

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        segmented = self.size > LARGEST
        there, back = (
            segments(source, target, self.size) if segmented else plain(source, target)
            for source, target in (MACS, MACS[::-1])
        )
        with (
            served_ports(server, place, segmented=segmented) as (started, ports),
            NetFrontend(ports[0].socket, there, segmented=segmented, features=self.features) as a,
            NetFrontend(ports[1].socket, back, segmented=segmented, features=self.features) as b,
        ):
            for frontend in (a, b):
                frontend.require(self.features, server.name)
            yield _NetTarget(started, a, b, self, place)


class _NetTarget(ServerTarget):
    """A server, and the driver's two ports on it."""

    def __init__(
        self, server: Started, a: NetFrontend, b: NetFrontend, load: NativeNet, place: Place
    ) -> None:
        super().__init__(server, place)
        self._ports = (a, b)
        self._load = load

    def measure(self, seconds: float) -> Sample:
        load, cpu = self._load, self._place.client_cpu
        a, b = self._ports
        began = self._server.cpu_seconds()
        # From b first: a switch that learns knows then where b is.
        run(b, a, size=load.size, depth=1, packets=16, cpu=cpu)
        send = partial(
            run,
            *(a, b),
            size=load.size,
            depth=load.depth,
            round_trip=load.round_trip,
            verify=load.verify,
            cpu=cpu,
        )
        warm_up = send(seconds=WARM_UP_SECONDS)
        start = self._server.cpu_seconds()
        outcome = send(seconds=seconds)
        end = self._server.cpu_seconds()
        received = outcome.received
        if not received:
            raise OSError(f"of {outcome.sent} frames none arrived")
        return Sample(
            operations=received,
            seconds=outcome.seconds,
            metrics={
                "packets_per_second": received / outcome.seconds,
                "bits_per_second": outcome.bytes * 8 / outcome.seconds,
                "latency_p50_us": percentile(outcome.latency, 0.5),
                "latency_p99_us": percentile(outcome.latency, 0.99),
                "lost_share": outcome.lost / outcome.sent,
                "server_cpu_us": (end - start) * 1e6 / received,
                "client_cpu_us": outcome.driver_cpu_seconds * 1e6 / received,
            },
            own_cpu_seconds=end - began,
            corrupt=outcome.corrupt + warm_up.corrupt,
            latency=by_floor(outcome.latency),
        )
