"""Network in a guest: iperf3 and ping between a stock Debian guest and a bridge on the host, over a
network card that vdev or QEMU itself serves.

Without KVM the guest's processor is emulated, and it limits most of these; then they say whether
a server is in the guest's way, and what it costs.
"""

from __future__ import annotations

from functools import partial

from perf.guest.net import NetGuest, Ping, Stream, Tcp
from perf.model import Suite, Workload

SERVERS = ("vdev", "qemu-virtio-net")
RATE = ("bits_per_second", "server_cpu_us", "vmm_cpu_us")
WAIT = ("latency_p50_us", "latency_p99_us", "server_cpu_us")

SUITE = Suite(
    "net-guest",
    "Network, in a guest",
    [
        Workload(
            "tcp-up", NetGuest(Tcp), SERVERS, "TCP, guest to host (CPU by MiB)", RATE, seconds=2
        ),
        Workload(
            "tcp-down",
            NetGuest(partial(Tcp, reverse=True)),
            SERVERS,
            "TCP, host to guest (CPU by MiB)",
            RATE,
            seconds=2,
        ),
        Workload("ping", NetGuest(Ping), SERVERS, "Round trip of a ping", WAIT, seconds=2),
        Workload(
            "stream",
            NetGuest(Stream),
            SERVERS,
            "TCP stream there and back, checked by SHA-256 (CPU by MiB)",
            RATE,
            seconds=2,
            verified=True,
        ),
    ],
    calm_share=0.2,
)
