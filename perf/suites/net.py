"""Network, no guest: frames from one port of a server to another, a core for each side.

testpmd passes frames from ring to ring without a look at them; vdev-switch, our switch between
guests, looks at each. testpmd-tap takes them through taps on a kernel bridge, as vdev's bridged
cards do: the peer with the same work.
"""

from __future__ import annotations

from perf.frontend.connection import RING_EVENT_IDX, RING_IN_ORDER, RING_PACKED
from perf.loads.net import NativeNet
from perf.loads.testpmd import TestpmdNet
from perf.model import Load, Suite, Workload

SERVERS = ("vdev", "testpmd-tap", "vdev-switch", "testpmd")
RATE = ("packets_per_second", "server_cpu_us")
THROUGHPUT = ("bits_per_second", "server_cpu_us")
WAIT = ("latency_p50_us", "latency_p99_us")
SIZES = (64, 256, 1024, 1514)
SEGMENT = 65000
DEPTH = 256
SHORT_SET = ("frames-64", "round-trip")


def _one(
    name: str,
    series: str,
    load: Load,
    compared: tuple[str, ...] = RATE,
    *,
    size: int = 0,
    verified: bool = False,
) -> Workload:
    return Workload(
        name,
        load,
        SERVERS,
        series,
        compared,
        x=("frame bytes", size) if size else None,
        verified=verified,
        gate=name in SHORT_SET,
    )


SUITE = Suite(
    "net",
    "Network, no guest",
    [
        *(
            _one(
                f"frames-{size}",
                "Frames one way, 256 in flight",
                NativeNet(size, DEPTH),
                size=size,
            )
            for size in SIZES
        ),
        *(
            _one(
                f"frames-64-{name}",
                f"64-byte frames one way, 256 in flight, {what}",
                NativeNet(64, DEPTH, features=RING_EVENT_IDX | features),
            )
            for name, what, features in (
                ("packed", "packed rings", RING_PACKED),
                ("in-order", "use in order", RING_IN_ORDER),
                ("packed-in-order", "packed rings, use in order", RING_PACKED | RING_IN_ORDER),
            )
        ),
        _one(
            "segments",
            "TCP segments of 65000 bytes one way, 64 in flight",
            NativeNet(SEGMENT, 64),
            THROUGHPUT,
        ),
        _one(
            "round-trip",
            "64-byte frame there and back, one in flight",
            NativeNet(64, 1, round_trip=True),
            WAIT,
        ),
        _one(
            "verify",
            "1514-byte frames one way, every byte checked",
            NativeNet(1514, 64, verify=True),
            verified=True,
        ),
        *(
            _one(
                f"testpmd-{size}",
                "testpmd as the client: frames round and round, 512 in flight",
                TestpmdNet(size),
                size=size,
            )
            for size in (64, 1514)
        ),
    ],
    # The kernel's work for a tap is in part nobody's: it counts as others' use of the cores.
    calm_share=0.3,
)
