"""Scale: 1 to 64 disks, queues and connections in one server; every byte is checked."""

from __future__ import annotations

from perf.loads.scale import Scale
from perf.model import Suite, Workload

SERVERS = ("vdev", "qsd")
COMPARED = ("iops", "server_cpu_us", "memory_mib")
COUNTS = (1, 4, 16, 64)


def _rows(name: str, series: str, x: str, loads: dict[int, Scale]) -> list[Workload]:
    return [
        Workload(f"{name}-{count}", load, SERVERS, series, COMPARED, x=(x, count), verified=True)
        for count, load in loads.items()
    ]


SUITE = Suite(
    "scale",
    "Scale, no guest",
    [
        *_rows(
            "disks",
            "Disks in one server, all under load",
            "disks",
            {count: Scale(devices=count) for count in COUNTS},
        ),
        *_rows(
            "queues",
            "Queues of one disk, all under load",
            "queues",
            {count: Scale(queues=count) for count in COUNTS},
        ),
        *_rows(
            "connections",
            "Connected disks, one of them under load",
            "connections",
            {count: Scale(devices=count, loaded=False) for count in COUNTS},
        ),
    ],
    calm_share=0.2,
)
