"""A run as one HTML file that needs nothing else: no network, no other file.

The template escapes all that comes from the run. Charts are data (JSON) for a script of our own,
and the page's policy lets nothing run but that script and Vega, by their hashes, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from perf.history import Point, merge, points_in
from perf.model import METRICS
from perf.report import charts, plots, view
from perf.report.digest import RunDigest, Series, SuiteDigest, digest
from perf.report.theme import FONT, Theme, css_variables, for_page
from perf.report.units import short_name
from perf.results import Run

HERE = Path(__file__).parent


def write_page(run: Run, path: Path, history: Sequence[Point] = ()) -> None:
    """Writes the page of a run; `history`: points of other commits, and of this one or not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    context = _Page(digest(run), history).context()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template("page.html.j2").render(context), encoding="utf-8")


@dataclass(frozen=True)
class _Placed:
    """A chart's place on the page; `number`: where its specification is in the list."""

    number: int
    title: str
    hint: str
    height: int


class _Page:
    """Collects the charts while it lays out the page."""

    def __init__(self, figures: RunDigest, history: Sequence[Point]) -> None:
        self.figures = figures
        self.theme: Theme = for_page(figures.servers)
        self.history = merge(history, points_in(figures))
        self.specs: list[dict[str, Any]] = []

    def context(self) -> dict[str, Any]:
        """What the template names."""
        run, rows = self.figures.run, self.figures.rows
        base = next((row.base.name for row in rows if row.base), "the base")
        suites = [self._suite(number, s) for number, s in enumerate(self.figures.suites, 1)]
        vega, script = _vega(), (HERE / "page.js").read_text()
        workloads = "1 workload" if len(rows) == 1 else f"{len(rows)} workloads"
        return {
            "run": run,
            "title": f"{base} beside its peers" if self.figures.servers else "No measurements",
            "lead": " · ".join([workloads, view.moment(run.started), f"commit {run.commit[:12]}"]),
            "base": base,
            "workloads": len(rows),
            "busy": sum(not row.calm for row in rows if row.counted),
            "theme": self.theme,
            "suites": suites,
            "tallies": view.tallies(self.figures),
            "facts": view.facts(self.figures),
            "servers": view.servers(self.figures),
            "css": Markup(_css()),
            "vega": Markup(vega),
            "script": Markup(script),
            "charts": Markup(_json(self.specs)),
            "policy": _policy(vega, script),
        }

    def _place(self, panel: charts.Panel) -> _Placed:
        chart = panel.chart.properties(width="container", description=panel.title)
        self.specs.append(charts.spec_of(chart, self.theme))
        return _Placed(len(self.specs) - 1, panel.title, panel.hint, panel.height)

    def _suite(self, number: int, suite: SuiteDigest) -> dict[str, Any]:
        rows = [(row.row.workload, row.comparisons) for row in charts.compared(suite.rows)]
        overview = None
        if len(rows) > 1:
            domain = plots.ratio_domain(comparisons for _, comparisons in rows)
            chart = plots.advantages(rows, domain, self.theme)
            overview = self._place(charts.Panel(suite.suite.title, "", chart, chart.height))
        return {
            "anchor": f"suite-{number}",
            "title": suite.suite.title,
            "servers": [
                n for n in self.figures.servers if any(n in s.servers for s in suite.series)
            ],
            "advantages": overview,
            "series": [
                self._series(f"series-{number}-{index}", series)
                for index, series in enumerate(suite.series, 1)
            ],
            "trends": self._trends(suite.suite.name),
        }

    def _series(self, anchor: str, series: Series) -> dict[str, Any]:
        return {
            "anchor": anchor,
            "name": series.name,
            "over": series.over,
            "card": view.card(series),
            "panels": [self._place(panel) for panel in charts.panels(series, self.theme)],
            "latency": [self._place(p) for p in charts.latency_panels(series, self.theme)],
            "table": view.table(series),
            "remarks": view.remarks(series),
            "failures": view.failures(series),
        }

    def _trends(self, suite: str) -> list[_Placed]:
        points: dict[tuple[str, str], list[Point]] = {}
        for point in self.history:
            if point.suite == suite and point.metric in METRICS:
                points.setdefault((point.workload, point.metric), []).append(point)
        return [
            self._place(
                charts.Panel(
                    f"{workload}, {short_name(metric)}",
                    charts.hint(metric),
                    plots.trend(found, self.theme),
                    plots.TREND_HEIGHT,
                )
            )
            for (workload, metric), found in points.items()
            if len({point.commit for point in found}) > 1
        ]


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed, which the page's charts share."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", charts.VEGA_LITE))


def _css() -> str:
    css = (HERE / "page.css").read_text().replace("@font@", FONT)
    return css.replace("@light@", css_variables(dark=False)).replace(
        "@dark@", css_variables(dark=True)
    )


def _json(specs: Sequence[dict[str, Any]]) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(specs, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(*scripts: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
