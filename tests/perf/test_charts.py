"""Which charts a run has, and that they are charts; pictures, cards and units."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import vl_convert

from perf.report import charts, plots, units, view
from perf.report.digest import RowDigest, digest
from perf.report.theme import SERVERS, for_page, for_pictures
from perf.results import Row
from tests.perf.sample_run import BASE, at_kiops, block, one_row, row, sample_history, sample_run


def test_the_charts_are_valid() -> None:
    run = sample_run(2, 100)
    figures = digest(run)
    theme = for_page(figures.servers)
    depths, _, disk = figures.suites[0].series
    rows = [(r.row.workload, r.comparisons) for r in charts.compared(figures.rows)]
    domain = plots.ratio_domain(comparisons for _, comparisons in rows)
    point = sample_history(run, 1)[0]
    for chart in (
        charts.panels(depths, theme)[0].chart,
        charts.panels(disk, theme)[0].chart,
        charts.latency_panels(disk, theme)[0].chart,
        plots.advantages(rows, domain, theme),
        plots.advantages([(name, found[:1]) for name, found in rows], domain, theme, beside=True),
        plots.trend([point, replace(point, commit="f00", placement="far")], theme),
    ):
        chart.to_dict()  # checks it against the schema
        spec = charts.spec_of(chart.properties(width="container"), theme)
        vl_convert.vegalite_to_vega(spec, vl_version=charts.VEGA_LITE)


def titles(*rows: Row) -> list[str]:
    figures = digest(one_row(*rows))
    return [p.title for p in charts.panels(figures.suites[0].series[0], for_page(figures.servers))]


def by_size(*sizes: int) -> list[Row]:
    return [
        row(f"{s}", "s", {"vdev": block(100, 1, 1, size=s)}, x=("size", s), rounds=2) for s in sizes
    ]


def test_rows_over_x_are_lines_and_sizes_show_throughput() -> None:
    lines = ["requests a second", "server CPU time an operation"]
    assert titles(*by_size(512, 4096)) == [*lines, "bytes a second"]
    depths = [replace(r, x=("depth", n)) for n, r in enumerate(by_size(512, 512))]
    assert titles(*depths) == lines


def test_rows_without_distinct_x_are_bars() -> None:
    bars = ["512: requests a second", "512: server CPU time an operation"]
    assert titles(*by_size(512, 512)) == bars * 2
    assert titles(*by_size(512)) == ["requests a second", "server CPU time an operation"]


def test_trends_are_in_the_order_of_time() -> None:
    first, *_ = sample_history(sample_run(2, 0), 1)
    points = [
        replace(first, commit=commit, date=f"2026-01-0{day}")
        for commit, day in (("bbbbbbbbb", 2), ("aaaaaaaaa", 3), ("ccccccccc", 1))
    ]
    spec = plots.trend(points, for_page([BASE])).to_dict()
    assert spec["layer"][0]["encoding"]["x"]["sort"] == ["ccccccc", "bbbbbbb", "aaaaaaa"]


@pytest.mark.parametrize(
    ("latency", "nines", "expected"),
    [
        ({1000: 100}, 1, 1.0),
        ({1000: 90, 5000: 10}, 1, 1.0),
        ({1000: 89, 5000: 11}, 1, 5.0),
        ({1000: 990, 5000: 9, 70000: 1}, 2, 1.0),
        ({70000: 1, 1000: 989, 5000: 10}, 2, 5.0),
        ({0: 1000}, 3, 0.001),
    ],
)
def test_quantiles(latency: dict[int, int], nines: float, expected: float) -> None:
    assert dict(plots.quantiles(latency))[nines] == expected


def test_quantiles_end_where_no_request_is_beyond() -> None:
    assert plots.quantiles({}) == []
    assert plots.quantiles({1000: 0}) == []
    found = plots.quantiles({1000: 999, 2000: 1})
    assert found[-1] == (3.0, 1.0)
    assert [us for _, us in found] == sorted(us for _, us in found)


def test_page_and_pictures_agree_on_colours() -> None:
    names = [f"server {number}" for number in range(len(SERVERS) + 1)]
    by_page, by_picture = for_page(names), for_pictures(names)
    for number, name in enumerate(names):
        assert by_page.colour(name) == f"var(--server-{number % len(SERVERS)})"
        assert by_picture.colour(name) == SERVERS[number % len(SERVERS)][0]


# Pictures


def test_pictures_are_pictures(tmp_path: Path) -> None:
    run = sample_run(2, 0)
    del run.suites[1:]
    found = charts.write_pictures(run, tmp_path / "new")
    series = {(suite.name, found.series) for suite in run.suites for found in suite.rows}
    assert [path.name for path in found][:2] == ["overview.png", "blk-null-4k-randread.png"]
    assert len(set(found)) == len(found) == 1 + len(series)
    for path in found:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert 400 < width < 3000
        assert 100 < height < 5000


def test_pictures_of_like_names_are_two(tmp_path: Path) -> None:
    rows = [row("w", name, at_kiops(vdev=10, peer=9), rounds=1) for name in ("a/b", "a b", "…")]
    found = charts.write_pictures(one_row(*rows), tmp_path)
    assert len({path.name for path in found}) == 4
    assert all(path.parent == tmp_path for path in found)


def test_a_card_of_a_mixed_series_takes_no_side() -> None:
    rows = [
        row("good", "s", at_kiops(vdev=20, peer=10), x=("depth", 1), rounds=4),
        row("bad", "s", at_kiops(vdev=10, peer=20), x=("depth", 4096), rounds=4),
    ]
    (series,) = digest(one_row(*rows)).suites[0].series
    card = view.card(series)
    assert card.verdict is None
    assert dict(card.counts) == {"ahead": 1, "even": 0, "behind": 1}
    assert [(point.label, point.verdict) for point in card.points] == [
        ("1", "ahead"),
        ("4k", "behind"),
    ]


def test_the_best_peer_is_the_best_in_that_metric() -> None:
    values = at_kiops(vdev=20, fast=15, thrifty=10)
    values["thrifty"]["server_cpu_us"] = 1.0
    found = RowDigest(row("w", "s", values, rounds=3))
    assert {c.metric: c.peer for c in found.comparisons} == {
        "iops": "fast",
        "server_cpu_us": "thrifty",
    }


def test_a_series_is_about_what_all_its_rows_are() -> None:
    rows = [
        row("a", "s", at_kiops(vdev=2), compared=("latency_p50_us", "iops"), rounds=1),
        row("b", "s", at_kiops(vdev=2), compared=("iops",), rounds=1),
    ]
    (series,) = digest(one_row(*rows)).suites[0].series
    assert series.headline == "iops"
    assert series.metrics[0] == "iops"


# Units


@pytest.mark.parametrize(
    ("metric", "values", "heading", "first"),
    [
        ("iops", [297e3, 1.48e6], "kIOPS", "297"),
        ("iops", [22e3, 2.1e6], "kIOPS", "22.0"),
        ("iops", [0.0], "IOPS", "0"),
        ("packets_per_second", [0.35e6, 42e6], "Mpps", "0.350"),
        ("bytes_per_second", [86e6, 51e9], "GB/s", "0.086"),
        ("bits_per_second", [13.6e9], "Gbit/s", "13.6"),
        ("latency_p99_us", [1234.0], "p99 µs", "1,234"),
        ("server_cpu_us", [0.0471], "CPU µs", "0.047"),
        ("lost_share", [0.0125], "lost %", "1.25"),
        ("memory_mib", [31.4], "memory MiB", "31.4"),
    ],
)
def test_units(metric: str, values: list[float], heading: str, first: str) -> None:
    scale = units.scale_of(metric, values)
    assert scale.heading == heading
    assert scale.format(values[0]) == first


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1, "1"),
        (64, "64"),
        (1024, "1024"),
        (1518, "1518"),
        (4096, "4k"),
        (131072, "128k"),
        (2**20, "1M"),
        (2**30, "1G"),
        (65000, "65000"),
        (0.5, "0.5"),
    ],
)
def test_what_workloads_are_set_to(value: float, words: str) -> None:
    assert units.compact(value) == words
