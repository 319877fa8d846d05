"""The reports: all of a run is in them, none of it acts in them, and colours tell the truth."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perf import stats
from perf.report import charts, page, table, units
from perf.report.digest import Verdict, digest, verdict
from perf.results import DIED, Failure, Row, Run, ServerResult, Window
from perf.stats import Estimate
from tests.perf.sample_run import (
    BASE,
    LOG,
    at_kiops,
    block,
    empty_run,
    one_row,
    row,
    sample_history,
    sample_run,
)

ROUNDS, REQUESTS = 3, 300
EVIL = (
    "<!--<script </script x></script><script>alert(1)</script>"
    "<img src=x onerror=alert(2)>\"'&{{7*7}}\x1b[31m"
)


class Html(HTMLParser):
    """The tags of a page, their attributes, and what stands between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.raw.get(self._inside, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.raw["script"][0])
        return found

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def page_of(run: Run, directory: Path, history: list[Any] | None = None) -> Html:
    path = directory / "report.html"
    page.write_page(run, path, history or ())
    return Html(path.read_text(encoding="utf-8"))


def table_of(run: Run, width: int = 100) -> str:
    console = Console(width=width, file=StringIO(), force_terminal=False)
    table.show(console, run)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """The reports show intervals whatever they are worth: coarse ones come sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    return sample_run(ROUNDS, REQUESTS)


@pytest.fixture(scope="module")
def html(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Html:
    history = [point for point in sample_history(run, commits=2) if point.suite == "start"]
    return page_of(run, tmp_path_factory.mktemp("page"), history)


@pytest.fixture(scope="module")
def shown(run: Run) -> str:
    return table_of(run)


# What is in the page


def test_the_page_loads_nothing(html: Html) -> None:
    for tag, attributes in html.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "poster"), (tag, name, value)
            assert not name.startswith("on"), (tag, name, value)
            if name.endswith("href"):
                assert value, tag
                assert value.startswith("#"), (tag, value)
            if name == "style":
                assert "url(" not in (value or "")
    for style in html.raw["style"]:
        assert "url(" not in style
        assert "@import" not in style


def test_the_page_forbids_whatever_is_not_in_it(html: Html) -> None:
    (policy,) = (a["content"] for t, a in html.tags if t == "meta" and "http-equiv" in a)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == "'unsafe-inline'"
    scripts = html.raw["script"][1:]  # the first is data
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert rules["script-src"].split() == [f"'sha256-{found}'" for found in hashes]


def test_vega_is_there_once(html: Html) -> None:
    assert html.count("script") == 3
    assert len(html.charts) > 20
    assert sum("vega" in script and len(script) > 100_000 for script in html.raw["script"][1:]) == 1


def test_charts_take_no_data_from_elsewhere(html: Html) -> None:
    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            for inner in value.values():
                yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    assert not {"url", "href"} & set(keys(html.charts))


def test_links_lead_to_places_in_the_page(html: Html) -> None:
    places = [attributes["id"] for _, attributes in html.tags if "id" in attributes]
    assert len(places) == len(set(places))
    links = {a["href"] for t, a in html.tags if t == "a"}
    assert links
    assert links <= {f"#{place}" for place in places}


def test_every_chart_has_one_place(html: Html) -> None:
    numbers = [int(a["data-chart"] or "") for _, a in html.tags if "data-chart" in a]
    assert sorted(numbers) == list(range(len(html.charts)))


def test_all_of_the_run_is_in_the_page(run: Run, html: Html) -> None:
    text = html.text
    for suite in run.suites:
        assert suite.title in text
        for found in suite.rows:
            assert found.workload in text
            assert found.series in text
            for server in found.servers:
                assert server.name in text
                assert server.version in text
            for name, reason in found.absent.items():
                assert f"{name} is absent: {reason}" in text
    for found, failure in run.failures:
        assert f"{failure.server} {failure.kind}" in text
        assert f"{found.workload}: {failure.message}" in text
        for line in failure.log:
            assert line in text
    for fact in [*run.machine.values(), run.commit, " ".join(run.command)]:
        assert fact in text


def test_headlines_come_first(html: Html) -> None:
    cards = html.text.split("Block devices, one queue, no guest")[2]
    for words in ("null 4k randread", "IOPS", "beside qemu-sd iothread", "qemu-sd iothread died"):
        assert words in cards, words


def colours_in(value: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a server and its colour, wherever a chart gives it one."""
    if isinstance(value, dict):
        scale = value.get("scale")
        if value.get("field") == "server" and isinstance(scale, dict):
            yield from zip(scale["domain"], scale["range"], strict=True)
        for inner in value.values():
            yield from colours_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from colours_in(inner)


def test_a_server_has_one_colour(html: Html) -> None:
    found: dict[str, set[str]] = {}
    for server, colour in colours_in(html.charts):
        if colour.startswith("var("):
            found.setdefault(server, set()).add(colour)
    assert found[BASE] == {"var(--server-0)"}
    assert all(len(colours) == 1 for colours in found.values())
    assert len({colour for (colour,) in found.values()}) == len(found) == 6


def test_history_needs_two_commits(run: Run, html: Html, tmp_path: Path) -> None:
    assert "Over commits" in html.text
    assert "Over commits" not in page_of(one_row(run.suites[0].rows[0]), tmp_path).text


def test_others_on_the_cores_are_named(run: Run, html: Html, shown: str, tmp_path: Path) -> None:
    assert "Others used the cores in 1 of 19 workloads" in html.text
    assert "busy: others used the cores too" in shown
    calm = one_row(run.suites[0].rows[0])
    assert "Others used" not in page_of(calm, tmp_path).text
    assert "busy" not in table_of(calm)


# Runs that did not go well


def test_a_run_cannot_act_in_its_page(tmp_path: Path) -> None:
    evil = row(EVIL, EVIL, {EVIL: block(10, 1, 1), f"peer {EVIL}": block(9, 1, 1)}, rounds=2)
    evil.servers[0].version = EVIL
    evil.absent[EVIL] = EVIL
    evil.failures.append(Failure(EVIL, DIED, EVIL, [EVIL]))
    run = replace(one_row(evil), commit=EVIL, started=EVIL, command=[EVIL], machine={EVIL: EVIL})
    run.suites[0].title = run.suites[0].name = EVIL
    html = page_of(run, tmp_path, sample_history(run, 2))
    assert html.count("script") == 3
    assert html.count("img") == 0
    assert "alert" not in html.raw["script"][2]
    assert html.charts
    assert "<" not in html.raw["script"][0]
    assert html.text.count(EVIL) > 10
    assert "{{7*7}}" in html.text


def test_a_run_cannot_steer_the_terminal() -> None:
    evil = row("[bold]work[/bold]\x1b[2J", "s", at_kiops(vdev=10, peer=9), rounds=2)
    evil.failures.append(Failure("peer", DIED, "\x1b]0;title\x07", ["[red]line[/red]\r\x1b[H"]))
    text = table_of(one_row(evil))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\x07" not in text
    assert "[bold]work[/bold]" in text
    assert "[red]line[/red]" in text


def died_base() -> Run:
    found = row("w", "s", at_kiops(vdev=10, peer=9), rounds=2)
    found.servers[0].windows = []
    found.again = None
    found.failures.append(Failure(BASE, DIED, "killed by SIGSEGV", LOG))
    return one_row(found)


def lost_base() -> Run:
    found = row("w", "s", at_kiops(peer=9), rounds=2)
    found.again = None
    found.failures.append(Failure(BASE, DIED, "did not start", LOG))
    return one_row(found)


def nothing_but_absence() -> Run:
    found = row("w", "s", at_kiops(vdev=10), rounds=2)
    found.servers, found.again = [], None
    found.absent = {"vdev": "no such program", "peer": "no such program either"}
    return one_row(found)


def with_metrics(**values: float) -> Run:
    found = row("w", "s", at_kiops(vdev=10, peer=9), rounds=3, x=("depth", 1))
    second = row("w2", "s", at_kiops(vdev=10, peer=9), rounds=3, x=("depth", 2))
    for server in [*found.servers, *second.servers]:
        server.windows = [replace(w, metrics={**w.metrics, **values}) for w in server.windows]
    return one_row(found, second)


def sometimes_zero() -> Run:
    found = row("w", "s", at_kiops(vdev=10, peer=9), rounds=2)
    windows = found.servers[0].windows
    windows[0] = replace(windows[0], metrics=dict.fromkeys(windows[0].metrics, 0.0))
    return one_row(found)


def never_kept_their_distance() -> Run:
    found = row("w", "s", at_kiops(vdev=10, peer=9), rounds=2)
    for server in found.servers:
        server.windows = [replace(w, placement="mixed") for w in server.windows]
    return one_row(found)


def unknown_metric() -> Run:
    return one_row(row("w", "s", at_kiops(vdev=10, peer=9), rounds=2, compared=("charm", "iops")))


ODD: dict[str, Callable[[], Run]] = {
    "interrupted": empty_run,
    "no suites": lambda: replace(empty_run(), suites=[]),
    "no rows": lambda: one_row(),
    "base died": died_base,
    "base did not start": lost_base,
    "nothing could be had": nothing_but_absence,
    "zero": lambda: with_metrics(iops=0.0, server_cpu_us=0.0, latency_p50_us=0.0),
    "sometimes zero": sometimes_zero,
    "NaN": lambda: with_metrics(iops=math.nan, server_cpu_us=math.nan),
    "infinite": lambda: with_metrics(iops=math.inf, latency_p50_us=math.inf),
    "one round": lambda: one_row(row("w", "s", at_kiops(vdev=10, peer=9), rounds=1, requests=1)),
    "no round counts": never_kept_their_distance,
    "a metric of the future": unknown_metric,
    "no metrics": lambda: one_row(
        Row(
            "w",
            "s",
            [],
            None,
            1,
            0.1,
            False,
            [ServerResult("vdev", "", [Window(0, {}, 1.0, (80, 80), "near", 0.0)])],
        )
    ),
    "no peers": lambda: one_row(row("w", "s", at_kiops(vdev=10), rounds=2)),
    "no second base": lambda: one_row(
        replace(row("w", "s", at_kiops(vdev=10, peer=9), rounds=2), again=None)
    ),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_an_odd_run_has_its_reports(make: Callable[[], Run], tmp_path: Path) -> None:
    run = make()
    html, text = page_of(run, tmp_path), table_of(run)
    shown = " ".join(text.split())
    assert isinstance(html.charts, list)  # it is JSON, so without NaN
    for found in (found for suite in run.suites for found in suite.rows):
        assert found.workload in html.text
        assert found.workload in text
        for name, reason in found.absent.items():
            assert f"{name} is absent: {reason}" in html.text
            assert f"absent: {name}: {reason}" in shown
        for failure in found.failures:
            assert failure.message in html.text
            assert failure.message in shown
            assert all(line in html.text and line in shown for line in failure.log)
    assert ("Interrupted" in html.text) == run.interrupted
    assert ("interrupted" in text) == run.interrupted
    for path in charts.write_pictures(run, tmp_path):
        assert path.stat().st_size


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    assert "Nothing was measured" in page_of(empty_run(), tmp_path).text
    assert "nothing was measured" in table_of(empty_run())
    assert charts.write_pictures(empty_run(), tmp_path) == []


def test_a_server_that_did_not_start_has_its_line(tmp_path: Path) -> None:
    run = lost_base()
    assert re.search(rf"^ +{BASE} +died", table_of(run), re.MULTILINE)
    page_of(run, tmp_path)
    line = rf'<tr class="failed"><td class="words">{BASE}<small>died</small>'
    assert re.search(line, (tmp_path / "report.html").read_text())


def test_rows_without_figures_say_why(tmp_path: Path) -> None:
    run = never_kept_their_distance()
    why = "w: no round counts: the cores' distance changed in all 2"
    assert why in page_of(run, tmp_path).text
    assert why in table_of(run)


# Verdicts


def estimate(low: float, value: float, high: float, count: int = 5) -> Estimate:
    return Estimate(value, low, high, count)


QUIET, LOUD = estimate(0.99, 1.0, 1.01), estimate(0.9, 1.0, 1.05)
VERDICTS: list[tuple[Estimate, Estimate | None, str, Verdict]] = [
    (estimate(1.04, 1.05, 1.06), QUIET, "higher", "ahead"),
    (estimate(1.04, 1.05, 1.06), QUIET, "lower", "behind"),
    (estimate(0.94, 0.95, 0.96), QUIET, "higher", "behind"),
    (estimate(0.94, 0.95, 0.96), QUIET, "lower", "ahead"),
    (estimate(0.99, 1.05, 1.10), QUIET, "higher", "even"),  # the interval holds 1
    (estimate(1.04, 1.05, 1.06), LOUD, "higher", "even"),  # within the noise, which is ±10 %
    (estimate(0.94, 0.95, 0.96), LOUD, "higher", "even"),
    (estimate(1.19, 1.20, 1.21), LOUD, "higher", "ahead"),
    (estimate(1.04, 1.05, 1.06), None, "higher", "ahead"),
    (estimate(1.5, 1.5, 1.5, count=1), QUIET, "higher", "even"),  # one round decides nothing
]


@pytest.mark.parametrize(("ratio", "noise", "better", "expected"), VERDICTS)
def test_verdicts_follow_noise(
    ratio: Estimate, noise: Estimate | None, better: str, expected: Verdict
) -> None:
    assert verdict(ratio, noise, better) == expected


@pytest.mark.parametrize(
    ("ours", "scatter", "expected"),
    [(20, 1.0, "ahead"), (5, 1.0, "behind"), (10, 1.0, "even"), (11, 1.3, "even")],
)
def test_colours_follow_verdicts(
    ours: float, scatter: float, expected: Verdict, tmp_path: Path
) -> None:
    """`scatter`: by which factor the base's second instance differs from the first."""
    found = row("w", "s", at_kiops(vdev=ours, peer=10), compared=("iops",), rounds=5)
    assert found.again
    found.again.windows = [
        replace(w, metrics={**w.metrics, "iops": w.metrics["iops"] * scatter})
        for w in found.servers[0].windows
    ]
    run = one_row(found)
    path = tmp_path / "p.html"
    page.write_page(run, path)
    for other in {"ahead", "even", "behind"}:
        assert (f'class="big {other}"' in path.read_text()) == (other == expected)
    styles = {"ahead": "\x1b[1;32m", "even": "\x1b[1m", "behind": "\x1b[1;31m"}
    console = Console(width=100, file=StringIO(), force_terminal=True, color_system="standard")
    table.show(console, run)
    assert isinstance(console.file, StringIO)
    ratio = units.ratio(digest(run).rows[0].comparisons[0].ratio.value)
    assert re.search(re.escape(styles[expected]) + f" *{ratio}\x1b", console.file.getvalue())


# The terminal


def test_all_of_the_run_is_in_the_table(run: Run, shown: str) -> None:
    words = " ".join(shown.split())
    for suite in run.suites:
        assert suite.title in shown
        for found in suite.rows:
            for server in found.servers:
                assert server.name in shown
            for name, reason in found.absent.items():
                assert f"absent: {name}: {reason}" in words
    for found, failure in run.failures:
        line = f"{failure.kind}: {failure.server}, {found.workload}: {failure.message}"
        assert line in words
        assert all(f"| {line}" in shown for line in failure.log)


def test_the_table_fits(shown: str) -> None:
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown


def test_the_table_has_units_ratios_and_noise(shown: str) -> None:
    for words in ("kIOPS", "Gbit/s", "p50 µs", "CPU µs", "start ms", "memory MiB"):
        assert words in shown
    assert f"{BASE} / best peer" in shown
    assert "95 % interval" in shown
    assert "A/A noise" in shown
    assert "▸" in shown
    assert "far" in shown
    assert f"{ROUNDS}/{ROUNDS} busy" in shown
