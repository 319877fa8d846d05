"""Which charts a run has, and the same as pictures; how each is drawn is in plots.py."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from perf.model import METRICS
from perf.report import plots
from perf.report.digest import RowDigest, RunDigest, Series, digest
from perf.report.theme import Theme, for_pictures
from perf.results import Run

PICTURE_WIDTH = 400
PICTURE_SCALE = 2
_THROUGHPUT = ("bits_per_second", "bytes_per_second")
_CPU = ("server_cpu_us", "vmm_cpu_us")

# The Vega-Lite that altair writes, as vl-convert names it.
VEGA_LITE = "_".join(alt.SCHEMA_VERSION.split(".")[:2])


@dataclass(frozen=True)
class Panel:
    """A chart with what stands over it; `hint`: which way is good; `height`: without axes."""

    title: str
    hint: str
    chart: plots.Chart
    height: int


def panels(series: Series, theme: Theme) -> list[Panel]:
    """The charts of a series: over x where its rows differ in it, else bars for each row."""
    metrics = _charted(series)
    if series.over:
        return [
            Panel(METRICS[m].title, hint(m), plots.curve(series, m, theme), plots.CURVE_HEIGHT)
            for m in metrics
        ]
    return [
        Panel(
            f"{row.row.workload}: {METRICS[m].title}" if len(series.rows) > 1 else METRICS[m].title,
            hint(m),
            plots.bars(row, m, theme),
            plots.BAR_STEP * len(row.measured),
        )
        for row in series.rows
        for m in metrics
        if any(row.value(server, m) for server in row.measured)
    ]


def hint(metric: str) -> str:
    """Which way a metric is good, where that is not plain."""
    return "less is better" if METRICS[metric].better == "lower" else ""


def latency_panels(series: Series, theme: Theme) -> list[Panel]:
    """The latency distributions of the rows that have one."""
    return [
        Panel(
            row.row.workload if len(series.rows) > 1 else "latency by percentile",
            "",
            plots.percentiles(row, theme),
            plots.CURVE_HEIGHT,
        )
        for row in series.rows
        if any(server.latency for server in row.measured)
    ]


def _charted(series: Series) -> list[str]:
    """The metrics that a series is drawn in: the compared ones, CPU, and throughput by size.

    Throughput says something of its own only where the size of an operation varies.
    """
    wanted = [metric for row in series.rows for metric in row.compared]
    if series.over and series.headline:
        sizes = (
            m for m in _THROUGHPUT if m != series.headline and _varies(series, m, series.headline)
        )
        wanted += list(sizes)[:1]
    return [
        metric for metric in series.metrics if metric in (*wanted, *_CPU) and series.values(metric)
    ]


def _varies(series: Series, metric: str, by: str) -> bool:
    shares = []
    for row in series.rows:
        for server in row.measured:
            above, below = row.value(server, metric), row.value(server, by)
            if above and below and below.value:
                shares.append(above.value / below.value)
    return bool(shares) and max(shares) > 1.2 * min(shares)


def spec_of(chart: alt.TopLevelMixin, theme: Theme) -> dict[str, Any]:
    """A chart as Vega-Lite. That it is valid is tested, not checked each time: it costs seconds."""
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return {**spec, "config": theme.config()}


def write_pictures(run: Run, directory: Path) -> list[Path]:
    """Writes PNG files: overview.png, and one for each series that was measured."""
    figures = digest(run)
    theme = for_pictures(figures.servers)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if any(row.comparisons for row in figures.rows):
        pictures["overview"] = _picture(_overview(figures, theme), theme)
    for suite in figures.suites:
        for series in suite.series:
            if found := panels(series, theme):
                name = _file_name(f"{suite.suite.name} {series.name}", pictures)
                pictures[name] = _picture(_together(series.name, found), theme)
    for name, picture in pictures.items():
        (directory / f"{name}.png").write_bytes(picture)
    return [directory / f"{name}.png" for name in pictures]


def _overview(figures: RunDigest, theme: Theme) -> alt.VConcatChart:
    """Each row by what it is compared by first."""
    suites = [
        (suite.suite.title, found)
        for suite in figures.suites
        if (found := [(row.row.workload, row.comparisons[:1]) for row in compared(suite.rows)])
    ]
    domain = plots.ratio_domain(first for _, found in suites for _, first in found)
    parts = [
        plots.advantages(found, domain, theme, beside=True).properties(
            width=PICTURE_WIDTH, title=title
        )
        for title, found in suites
    ]
    return alt.vconcat(*parts, spacing=24)


def compared(rows: Sequence[RowDigest]) -> list[RowDigest]:
    """The rows in which the base could be compared with a peer."""
    return [row for row in rows if row.comparisons]


def _together(title: str, found: Sequence[Panel]) -> alt.ConcatChart:
    columns = 3 if len(found) % 3 == 0 else 2
    width = PICTURE_WIDTH * 2 // 3 if columns == 3 else PICTURE_WIDTH
    parts = [panel.chart.properties(width=width, title=_picture_title(panel)) for panel in found]
    return alt.concat(
        *parts, columns=columns, title=alt.TitleParams(title, fontSize=16), spacing=28
    )


def _picture_title(panel: Panel) -> alt.TitleParams:
    words = f"{panel.title}, {panel.hint}" if panel.hint else panel.title
    return alt.TitleParams(words, fontWeight="normal")


def _picture(chart: alt.TopLevelMixin, theme: Theme) -> bytes:
    spec = {**spec_of(chart, theme), "padding": 16}
    return bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=PICTURE_SCALE))


def _file_name(words: str, taken: Container[str]) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "series"
    return name if name not in taken else _file_name(f"{words} again", taken)
