"""The ratios to the best peers over commits: perf/history.jsonl, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from perf.report.digest import RunDigest, digest
from perf.results import ResultsError, Run

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Point:
    """The base over its best peer in one metric of a workload, at one commit."""

    commit: str
    date: str
    suite: str
    workload: str
    metric: str
    placement: str
    peer: str
    ratio: Ratio
    low: Ratio
    high: Ratio

    @property
    def key(self) -> tuple[str, ...]:
        """What there is one point of."""
        return (self.commit, self.suite, self.workload, self.metric, self.placement)


_POINT: TypeAdapter[Point] = TypeAdapter(Point)


def points_of(run: Run) -> list[Point]:
    """The points of a run: of the rows in which the base and a peer were measured."""
    return points_in(digest(run))


def points_in(figures: RunDigest) -> list[Point]:
    """The same, of figures that are there already."""
    return [
        Point(
            commit=figures.run.commit,
            date=figures.run.started,
            suite=suite.suite.name,
            workload=row.row.workload,
            metric=comparison.metric,
            placement=row.placement,
            peer=comparison.peer,
            ratio=comparison.ratio.value,
            low=comparison.ratio.low,
            high=comparison.ratio.high,
        )
        for suite in figures.suites
        for row in suite.rows
        for comparison in row.comparisons
    ]


def merge(earlier: Iterable[Point], later: Iterable[Point]) -> list[Point]:
    """Both, in order; a later point takes the place of an earlier one of the same key."""
    points = {point.key: point for point in earlier}
    points.update((point.key, point) for point in later)
    return list(points.values())


def append(path: Path, points: Sequence[Point]) -> None:
    """Adds points to the file; they replace those of the same commit, row, metric and placement.

    The file is replaced whole: a reader sees the old one or the new one. Raises ResultsError for
    a file that is damaged, which is left as it is.
    """
    merged = merge(read(path), points)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(b"".join(_POINT.dump_json(point) + b"\n" for point in merged))
    beside.replace(path)


def read(path: Path) -> list[Point]:
    """The points of a file, none where there is no file.

    Raises ResultsError, which names the line, for a file that is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            points.append(_POINT.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            what = f"{where}: {first['msg']}" if where else first["msg"]
            raise ResultsError(f"{path}, line {number}: {what}") from None
    return points
