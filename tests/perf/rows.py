"""Rows of results made by hand, a window a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perf.host import Host
from perf.results import SCHEMA, Row, Run, ServerResult, SuiteResult, Window

NEAR, FAR, MIXED = "near", "far", "mixed"
HOST = Host("AMD EPYC", "6.18.44-one", system_call_ns=180.0, read_ns=760.0)


def window(number: int, *, placement: str = NEAR, others: float = 0.0, **metrics: float) -> Window:
    """A window of round `number`."""
    return Window(number, metrics, 1.0, (100.0, 100.0), placement, others)


def server(name: str, windows: Sequence[Window]) -> ServerResult:
    return ServerResult(name, "1.0", list(windows))


def row(
    values: Mapping[str, Sequence[float]],
    *,
    metric: str = "iops",
    again: Sequence[float] = (),
    placement: str = NEAR,
    workload: str = "row",
    wanted: int = 1,
) -> Row:
    """A row of calm windows: `values` of the metric by server, a round each."""

    def windows(numbers: Sequence[float]) -> list[Window]:
        return [window(i, placement=placement, **{metric: n}) for i, n in enumerate(numbers)]

    return Row(
        workload=workload,
        series="series",
        compared=[metric],
        x=None,
        wanted=wanted,
        calm_share=0.1,
        verified=False,
        servers=[server(name, windows(numbers)) for name, numbers in values.items()],
        again=server(next(iter(values)), windows(again)) if again else None,
    )


def run(*rows: Row, host: Host = HOST) -> Run:
    """A run with these rows."""
    suite = SuiteResult("suite", "Suite", list(rows))
    return Run(SCHEMA, "2026-01-01T00:00:00+00:00", 1.0, [], "abc", {}, host, [suite])
