"""Rings: packed beside split ones, what it costs to note what is in flight, or written, and to use
chains in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from perf.frontend.blk import Pattern
from perf.loads.rings import Rings
from perf.model import Suite, Workload

COMPARED = ("iops", "server_cpu_us")
DEPTHS = (1, 4, 16, 32, 64, 256)
LAYOUTS = ("vdev", "vdev-packed")


class Compared(NamedTuple):
    """What is off and on, and of each layout the server in both manners."""

    what: str
    layouts: Mapping[str, tuple[str, str]]


def _compared(what: str, manner: str) -> Compared:
    split, packed = LAYOUTS
    layouts = {"split": (split, f"{split}-{manner}"), "packed": (packed, f"{packed}-{manner}")}
    return Compared(what, layouts)


NOTED = _compared("in-flight tracking", "inflight")
LOGGED = _compared("dirty log", "logged")
ORDERED = _compared("use in order", "in-order")


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


def _off_and_on(
    name: str,
    what: str,
    image: str,
    pattern: Pattern,
    compared: Compared = NOTED,
) -> list[Workload]:
    return [
        Workload(
            f"{name}-{layout}",
            Rings(image, pattern),
            servers,
            f"4 KiB random {what}, {image}, depth 32, {layout}: {compared.what} off and on",
            COMPARED,
            verified=pattern.verify,
        )
        for layout, servers in compared.layouts.items()
    ]


SUITE = Suite(
    "rings",
    "Rings, no guest",
    [
        *_by_depth("null"),
        *_by_depth("tmpfs"),
        *_off_and_on("inflight-null", "read", "null", Pattern(depth=32)),
        *_off_and_on("inflight-read", "read", "tmpfs", Pattern(depth=32)),
        *_off_and_on("inflight-write", "write", "tmpfs", Pattern(depth=32, write_percent=100)),
        *_off_and_on("log-null", "read", "null", Pattern(depth=32), LOGGED),
        *_off_and_on("log-read", "read", "tmpfs", Pattern(depth=32), LOGGED),
        *_off_and_on("log-write", "write", "tmpfs", Pattern(depth=32, write_percent=100), LOGGED),
        *_off_and_on("order-null", "read", "null", Pattern(depth=32), ORDERED),
        *_off_and_on("order-read", "read", "tmpfs", Pattern(depth=32), ORDERED),
        *_off_and_on(
            "verify", "half written, checked", "tmpfs", Pattern(write_percent=50, verify=True)
        ),
        *_off_and_on(
            "order-verify",
            "half written, checked",
            "tmpfs",
            Pattern(write_percent=50, verify=True),
            ORDERED,
        ),
    ],
)
