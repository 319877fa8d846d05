"""Counters and latencies of queues, read from the native side without disturbing it.

Latencies come as a log-linear histogram of nanoseconds (8 buckets to a power of two), so every
figure drawn from it is within about 6 % of the truth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vdev._native import ffi, lib

COUNTERS: tuple[str, ...] = tuple(
    name.removeprefix("VHOST_COUNTER_").lower()
    for _, name in sorted(ffi.typeof("enum vhost_counter").elements.items())
    if name != "VHOST_COUNTER_COUNT"
)
BUCKETS: int = lib.VHOST_HISTOGRAM_BUCKETS
_floors: list[int] = []


def device_stats(native: Any, num_queues: int) -> dict[str, Any]:
    """The counters of a `struct vhost_device *`.

    {"queues": [one a queue], "total": all of them}, each a dict of the names in COUNTERS and of
    "latency": see `summarize`.
    """
    sets = [_read(native, index) for index in range(num_queues)]
    counters = [[sum(values) for values in zip(*(c for c, _ in sets), strict=True)]] if sets else []
    latency = [[sum(values) for values in zip(*(h for _, h in sets), strict=True)]] if sets else []
    return {
        "queues": [_named(c, h) for c, h in sets],
        "total": _named(
            counters[0] if counters else [0] * len(COUNTERS),
            latency[0] if latency else [0] * BUCKETS,
        ),
    }


def summarize(histogram: Sequence[int]) -> dict[str, int]:
    """Count, and in nanoseconds mean, p50, p99, p99.9 and max, of a native histogram."""
    count = sum(histogram)
    if count == 0:
        return dict.fromkeys(("count", "mean", "p50", "p99", "p99.9", "max"), 0)
    middles = [_middle(bucket) for bucket in range(len(histogram))]
    last = max(bucket for bucket, n in enumerate(histogram) if n)
    return {
        "count": count,
        "mean": sum(n * middle for n, middle in zip(histogram, middles, strict=True)) // count,
        "p50": middles[_quantile(histogram, count, 500)],
        "p99": middles[_quantile(histogram, count, 990)],
        "p99.9": middles[_quantile(histogram, count, 999)],
        "max": _edges()[last + 1] - 1,
    }


def _read(native: Any, index: int) -> tuple[list[int], list[int]]:
    stats = ffi.new("struct vhost_stats *")
    result = lib.vhost_device_read_stats(native, index, stats)
    if result < 0:
        raise OSError(-result, os.strerror(-result), f"counters of queue {index}")
    # The set has room behind the last counter that exists.
    return list(stats.counter)[: len(COUNTERS)], list(stats.latency)


def _named(counters: Sequence[int], histogram: Sequence[int]) -> dict[str, Any]:
    return {**dict(zip(COUNTERS, counters, strict=True)), "latency": summarize(histogram)}


def _quantile(histogram: Sequence[int], count: int, per_mille: int) -> int:
    """The bucket of the request that `per_mille` thousandths of all are not slower than."""
    rank = -(-count * per_mille // 1000)
    for bucket, n in enumerate(histogram):
        rank -= n
        if rank <= 0:
            return bucket
    return len(histogram) - 1


def _edges() -> list[int]:
    """The lower edge of each bucket; the last bucket is taken to be as wide as the one before."""
    if not _floors:
        _floors.extend(lib.vhost_histogram_floor(bucket) for bucket in range(BUCKETS))
        _floors.append(2 * _floors[-1] - _floors[-2])
    return _floors


def _middle(bucket: int) -> int:
    edges = _edges()
    return (edges[bucket] + edges[bucket + 1] - 1) // 2
