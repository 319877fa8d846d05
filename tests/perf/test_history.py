"""The history file: points replace their like, and a damaged file is named by its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perf import history
from perf.history import Point
from perf.results import ResultsError
from tests.perf.sample_run import empty_run, sample_run

POINT = Point(
    commit="8c76e5e",
    date="2026-11-20T14:28:06+00:00",
    suite="blk",
    workload="null 4k",
    metric="iops",
    placement="near",
    peer="qemu-sd",
    ratio=1.25,
    low=1.2,
    high=1.3,
)


def test_points_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    points = [POINT, replace(POINT, workload='a "quoted" µ\n')]
    history.append(path, points)
    assert history.read(path) == points
    assert len(path.read_text().splitlines()) == 2
    assert json.loads(path.read_text().splitlines()[0])["ratio"] == 1.25


def test_no_file_has_no_points(tmp_path: Path) -> None:
    assert history.read(tmp_path / "none.jsonl") == []


def test_points_replace_their_like(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    others = [
        replace(POINT, commit="other"),
        replace(POINT, suite="other"),
        replace(POINT, workload="other"),
        replace(POINT, metric="other"),
        replace(POINT, placement="far"),
    ]
    history.append(path, [POINT, *others])
    again = replace(POINT, ratio=2.0, low=1.9, high=2.1, peer="spdk", date="2027-01-01")
    history.append(path, [again])
    assert history.read(path) == [again, *others]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


GOOD = '{"commit":"c","date":"d","suite":"s","workload":"w","metric":"m","placement":"near",' \
    '"peer":"p","ratio":1.0,"low":0.9,"high":1.1}'  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        (GOOD.replace('"ratio":1.0,', ""), "ratio"),
        (GOOD.replace("1.0", '"much"'), "ratio"),
        (GOOD.replace("1.0", "NaN"), "ratio"),
        (GOOD.replace("0.9", "0"), "low"),
        (GOOD[:40], "Invalid JSON"),
        ("\x80", "JSON"),
    ],
)
def test_a_damaged_file_is_named_by_its_line(tmp_path: Path, bad: str, what: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(f"{GOOD}\n\n{bad}\n{GOOD}\n".encode("latin-1"))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"history\.jsonl, line 3: ") as error:
        history.read(path)
    assert what in str(error.value)
    with pytest.raises(ResultsError):
        history.append(path, [POINT])
    assert path.read_bytes() == before


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="directory"):
        history.read(tmp_path)


def test_points_of_a_run() -> None:
    run = sample_run(rounds=2, requests=0)
    points = history.points_of(run)
    assert {point.commit for point in points} == {run.commit}
    assert {point.date for point in points} == {run.started}
    first = points[0]
    assert (first.suite, first.workload, first.metric) == (
        "blk",
        "null 4k randread, depth 1",
        "iops",
    )
    assert first.peer == "qemu-sd iothread"
    assert first.low <= first.ratio <= first.high
    assert first.ratio == pytest.approx(610 / (297 * 1.06), rel=0.1)
    compared = {(point.suite, point.workload) for point in points}
    assert ("net", "packed ring, jumbo frames") not in compared  # the base hung
    assert ("blk", "disk 4k randread, O_DIRECT, depth 32") not in compared  # no round counts
    assert {point.placement for point in points} == {"near", "far"}
    assert len({point.key for point in points}) == len(points)


def test_an_empty_run_has_no_points() -> None:
    assert history.points_of(empty_run()) == []
