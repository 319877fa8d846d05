"""Rings: packed beside split ones, and what it costs to note what is in flight, or written."""

from __future__ import annotations

from collections.abc import Mapping

from perf.frontend.blk import Pattern
from perf.loads.rings import Rings
from perf.model import Suite, Workload

COMPARED = ("iops", "server_cpu_us")
DEPTHS = (1, 4, 16, 32, 64, 256)
LAYOUTS = ("vdev", "vdev-packed")
NOTED = {"split": ("vdev", "vdev-inflight"), "packed": ("vdev-packed", "vdev-packed-inflight")}
LOGGED = {"split": ("vdev", "vdev-logged"), "packed": ("vdev-packed", "vdev-packed-logged")}


def _by_depth(image: str) -> list[Workload]:
    return [
        Workload(
            f"{image}-qd{depth}",
            Rings(image, Pattern(depth=depth)),
            LAYOUTS,
            f"4 KiB random read, {image}, split and packed",
            COMPARED,
            x=("queue depth", depth),
        )
        for depth in DEPTHS
    ]


def _noted(
    name: str,
    what: str,
    image: str,
    pattern: Pattern,
    compared: Mapping[str, tuple[str, str]] = NOTED,
) -> list[Workload]:
    noting = "in-flight tracking" if compared is NOTED else "dirty log"
    return [
        Workload(
            f"{name}-{layout}",
            Rings(image, pattern),
            servers,
            f"4 KiB random {what}, {image}, depth 32, {layout}: {noting} off and on",
            COMPARED,
            verified=pattern.verify,
        )
        for layout, servers in compared.items()
    ]


SUITE = Suite(
    "rings",
    "Rings, no guest",
    [
        *_by_depth("null"),
        *_by_depth("tmpfs"),
        *_noted("inflight-null", "read", "null", Pattern(depth=32)),
        *_noted("inflight-read", "read", "tmpfs", Pattern(depth=32)),
        *_noted("inflight-write", "write", "tmpfs", Pattern(depth=32, write_percent=100)),
        *_noted("log-null", "read", "null", Pattern(depth=32), LOGGED),
        *_noted("log-read", "read", "tmpfs", Pattern(depth=32), LOGGED),
        *_noted("log-write", "write", "tmpfs", Pattern(depth=32, write_percent=100), LOGGED),
        *_noted("verify", "half written, checked", "tmpfs", Pattern(write_percent=50, verify=True)),
    ],
)
