"""The kinds of plot, as altair builds them; which of them a run has is in charts.py.

Fields have names of our own and all that comes from a run is a value, never a part of a field's
name or of a Vega expression: nothing in a run can change what a chart does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import floor, inf, log10
from typing import Any, TypeAlias

import altair as alt

from perf.history import Point
from perf.report.digest import Comparison, RowDigest, Series, noise_share
from perf.report.theme import Theme
from perf.report.units import (
    TIMES,
    Scale,
    compact,
    digits,
    interval,
    ratio,
    scale_of,
    short_name,
    times,
)
from perf.stats import Estimate

Chart: TypeAlias = alt.LayerChart | alt.FacetChart
Record: TypeAlias = dict[str, Any]

BAR_STEP = 26
CURVE_HEIGHT = 230
TREND_HEIGHT = 110
NAME_WIDTH = 170
_WIDE = 40  # values that are so many times others need a logarithmic axis
_NINES_STEPS = 16  # points a decade on a latency curve
_RATIO_TICKS = (  # by how far apart the ends of the axis are
    (2.2, (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2)),
    (5, (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5)),
    (20, (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)),
    (inf, (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)),
)


def _described(estimate: Estimate, scale: Scale) -> Record:
    """A value for a chart, and in words for its tooltip."""
    bounds = f"{scale.format(estimate.low)} to {scale.format(estimate.high)}"
    return {
        "value": estimate.value / scale.factor,
        "low": estimate.low / scale.factor,
        "high": estimate.high / scale.factor,
        "words": f"{scale.format(estimate.value)} {scale.unit}",
        "bounds": f"{bounds} ({estimate.count} rounds)",
    }


def _server_colour(theme: Theme, names: Sequence[str], *, legend: bool = True) -> alt.Color:
    shown = alt.Legend(title=None) if legend and theme.legend else None
    scale = alt.Scale(domain=names, range=[theme.colour(name) for name in names])
    return alt.Color("server:N", scale=scale, legend=shown)


_WORDS = (
    alt.Tooltip("server:N"),
    alt.Tooltip("words:N", title="median"),
    alt.Tooltip("bounds:N", title="95 % interval"),
)


def curve(series: Series, metric: str, theme: Theme) -> Chart:
    """A metric over x, a line for each server, with the interval as a band."""
    scale = scale_of(metric, series.values(metric))
    records: list[Record] = [
        {"server": server.name, "x": row.row.x[1], **_described(value, scale)}
        for row in series.rows
        for server in row.measured
        if row.row.x and (value := row.value(server, metric))
    ]
    names = [name for name in series.servers if any(r["server"] == name for r in records)]
    points = sorted({record["x"] for record in records})
    log = len(points) > 1 and points[0] > 0 and points[-1] >= 4 * points[0]
    labels = {int(x) if x == int(x) else x: compact(x) for x in points}  # keys as in JavaScript
    x = alt.X(
        "x:Q",
        title=series.over,
        scale=alt.Scale(
            nice=False, padding=14, **({"type": "log", "base": 2} if log else {"zero": False})
        ),
        axis=alt.Axis(
            values=points,
            grid=False,
            labelFlush=False,
            labelOverlap="greedy",
            labelExpr=f"({json.dumps(labels)})[datum.value]",
        ),
    )
    ends = [record[bound] for record in records for bound in ("low", "high")]
    wide = 0 < _WIDE * min(ends, default=0) < max(ends, default=0)
    colour = _server_colour(theme, names)
    shape = alt.Shape(
        "server:N",
        scale=alt.Scale(domain=names, range=[theme.shape(name) for name in names]),
        legend=alt.Legend(title=None) if theme.legend else None,
    )
    base = alt.Chart(alt.InlineData(values=tuple(records))).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.16).encode(
        y=_height("low", scale.heading, ends, log=wide), y2="high:Q"
    )
    y = _height("value", scale.heading, ends, log=wide)
    line = base.mark_line(strokeWidth=2.2).encode(y=y)
    dots = base.mark_point(filled=True, size=64, opacity=1).encode(
        y=y, shape=shape, tooltip=[_WORDS[0], alt.Tooltip("x:Q", title=series.over), *_WORDS[1:]]
    )
    return alt.layer(band, line, dots).properties(height=CURVE_HEIGHT)


def _height(field: str, title: str, values: Sequence[float], *, log: bool) -> alt.Y:
    """The y axis, with its title over it, where it takes no width."""
    axis: Record = {"values": _log_ticks(values), "format": ",~r"} if log else {"tickCount": 5}
    return alt.Y(
        f"{field}:Q",
        scale=alt.Scale(type="log", nice=False) if log else alt.Scale(zero=True),
        axis=alt.Axis(
            title=title,
            titleAngle=0,
            titleAlign="left",
            titleAnchor="end",
            titleBaseline="bottom",
            titleX=0,
            titleY=-12,
            labelOverlap="greedy",
            **axis,
        ),
    )


def _log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, ... as far as the values go."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def bars(row: RowDigest, metric: str, theme: Theme) -> Chart:
    """A metric of one workload, a bar for each server, with the interval as a whisker."""
    found = {s.name: value for s in row.measured if (value := row.value(s, metric))}
    scale = scale_of(metric, [value.value for value in found.values()])
    records = [{"server": name, **_described(value, scale)} for name, value in found.items()]
    names = list(found)
    top = max((record["high"] for record in records), default=0.0)
    base = alt.Chart(alt.InlineData(values=tuple(records))).encode(
        y=alt.Y(
            "server:N",
            sort=names,
            title=None,
            axis=alt.Axis(labelLimit=130, labelFontSize=12),
        )
    )
    x = alt.X("value:Q", axis=None, scale=alt.Scale(domain=[0, top * 1.35 or 1], nice=False))
    bar = base.mark_bar(size=16, cornerRadiusEnd=2).encode(
        x=x, color=_server_colour(theme, names, legend=False), tooltip=[*_WORDS]
    )
    whisker = base.mark_rule(strokeWidth=1.4, color=theme.colours["ink"]).encode(
        x=alt.X("low:Q", axis=None), x2="high:Q"
    )
    label = base.mark_text(align="left", dx=8, fontSize=12).encode(x="high:Q", text="words:N")
    return alt.layer(bar, whisker, label).properties(height=BAR_STEP * max(1, len(names)))


def quantiles(latency: Mapping[int, int]) -> list[tuple[float, float]]:
    """A histogram as pairs of nines (1 is 90 %, 2 is 99 %) and the latency in µs there.

    Ends where no request is beyond; a histogram of a few requests has next to nothing to show.
    """
    total = sum(latency.values())
    if not total:
        return []
    buckets = sorted((ns, count) for ns, count in latency.items() if count)
    last = log10(total)
    wanted = [step / _NINES_STEPS for step in range(1, int(last * _NINES_STEPS) + 1)]
    found: list[tuple[float, float]] = []
    ns, count = buckets[0]
    below, index = count, 0
    for nines in wanted:
        while below < (1 - 10**-nines) * total and index + 1 < len(buckets):
            index += 1
            ns, count = buckets[index]
            below += count
        found.append((nines, max(ns, 1) / 1000))
    return found


def percentiles(row: RowDigest, theme: Theme) -> Chart:
    """The latency distribution: latency, logarithmic, over the percentile by nines."""
    records: list[Record] = [
        {
            "server": server.name,
            "nines": nines,
            "us": us,
            "percentile": f"{100 - 10 ** (2 - nines):.{max(0, int(nines + 0.999) - 1)}f} %",
            "words": f"{digits(us)} µs",
        }
        for server in row.measured
        for nines, us in quantiles(server.latency)
    ]
    names = [s.name for s in row.measured if s.latency]
    x = alt.X(
        "nines:Q",
        title="percentile",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(
            values=[log10(2), 1, 2, 3, 4, 5, 6],
            labelOverlap="greedy",
            labelExpr="datum.value < 0.5 ? '50 %' : datum.value < 1.5 ? '90 %'"
            " : datum.value < 2.5 ? '99 %' : format(100 - pow(10, 2 - datum.value),"
            " '.' + format(datum.value - 2, 'd') + 'f') + ' %'",
        ),
    )
    y = _height("us", "µs", [record["us"] for record in records], log=True)
    base = alt.Chart(alt.InlineData(values=tuple(records))).encode(
        x=x, y=y, color=_server_colour(theme, names)
    )
    line = base.mark_line(strokeWidth=2)
    touch = base.mark_point(filled=True, size=70, opacity=0).encode(
        tooltip=[
            alt.Tooltip("server:N"),
            alt.Tooltip("percentile:N"),
            alt.Tooltip("words:N", title="latency"),
        ]
    )
    return alt.layer(line, touch).properties(height=CURVE_HEIGHT)


Compared: TypeAlias = tuple[str, Sequence[Comparison]]
"""A row by its name, and its comparisons."""


def ratio_domain(rows: Iterable[Sequence[Comparison]]) -> tuple[float, float]:
    """The advantages of all these rows, with room for words beside the outermost."""
    bounds = [0.9, 1.1]
    for comparison in (comparison for row in rows for comparison in row):
        bounds += [comparison.advantage.low, comparison.advantage.high]
    low, high = min(bounds), max(bounds)
    room = (high / low) ** 0.3
    return low / room, high * room


def advantages(
    rows: Sequence[Compared], domain: tuple[float, float], theme: Theme, *, beside: bool = False
) -> Chart:
    """How many times better than the best peer, a line for each row and comparison.

    A row's name stands over its lines, where it takes no width, or `beside` its only one. The
    grey bar about 1 is what two instances of the base differ by.
    """
    records = [
        {"line": title if beside else f"{number} {rank}", **_advantage(title, comparison)}
        for number, (title, comparisons) in enumerate(rows)
        for rank, comparison in enumerate(comparisons)
    ]
    titles = [{"line": f"{number}", "title": title} for number, (title, _) in enumerate(rows)]
    lines = [record["line"] for record in records]
    if not beside:
        lines = sorted([*lines, *(title["line"] for title in titles)], key=_line_order)
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    verdicts = ["ahead", "even", "behind"]
    low, high = domain
    ticks = next(ticks for apart, ticks in _RATIO_TICKS if high / low <= apart)
    on_x: Record = {
        "title": "times better than the best peer",
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        "axis": alt.Axis(
            values=[tick for tick in ticks if low <= tick <= high],
            labelExpr=f"datum.label + '{TIMES}'",
            format="~r",
            labelOverlap="greedy",
        ),
    }
    legend = alt.Legend(title=None) if theme.legend else None
    colour = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=verdicts, range=[theme.colours[v] for v in verdicts]),
        legend=legend,
    )
    names = alt.Axis(labelLimit=NAME_WIDTH, minExtent=NAME_WIDTH, labelFontSize=12)
    y = alt.Y("line:N", sort=lines, title=None, axis=names if beside else None)
    base = alt.Chart(alt.InlineData(values=tuple(records))).encode(y=y)
    noise = base.mark_bar(
        opacity=0.16, color=theme.colours["muted"], height=alt.RelativeBandSize(1)
    ).encode(x=alt.X("noise_low:Q", **on_x), x2="noise_high:Q")
    even = (
        alt.Chart(alt.InlineData(values=[{"value": 1}]))
        .mark_rule(strokeDash=[3, 3])
        .encode(x=alt.X("value:Q", **on_x))
    )
    over = (
        alt.Chart(alt.InlineData(values=[] if beside else titles))
        .mark_text(align="left", fontSize=12, color=theme.colours["ink"], dy=3)
        .encode(y=y, x=alt.value(0), text="title:N")
    )
    span = base.mark_rule(strokeWidth=2.4).encode(
        x=alt.X("low:Q", **on_x), x2="high:Q", color=colour
    )
    dot = base.mark_point(filled=True, size=72, opacity=1).encode(
        x=alt.X("value:Q", **on_x),
        color=colour,
        shape=alt.Shape("metric:N", scale=alt.Scale(domain=metrics), legend=legend),
        tooltip=[
            alt.Tooltip("workload:N"),
            alt.Tooltip("metric:N"),
            alt.Tooltip("words:N", title="ratio to the best peer"),
            alt.Tooltip("bounds:N", title="95 % interval"),
            alt.Tooltip("peer:N", title="best peer"),
            alt.Tooltip("noise:N", title="A/A noise"),
            alt.Tooltip("verdict:N"),
        ],
    )
    # Words stand on the outer side, clear of the line at 1.
    right = base.transform_filter("datum.value >= 1").mark_text(align="left", dx=8)
    left = base.transform_filter("datum.value < 1").mark_text(align="right", dx=-8)
    words = [
        text.encode(x=alt.X(field, **on_x), text="words:N", color=colour)
        for text, field in ((right, "high:Q"), (left, "low:Q"))
    ]
    height = len(lines) * 18 + 6
    return alt.layer(noise, even, over, span, dot, *words).properties(height=height)


def _line_order(line: str) -> tuple[int, ...]:
    return tuple(map(int, line.split()))


def _advantage(workload: str, comparison: Comparison) -> Record:
    better = comparison.advantage
    noise = noise_share(comparison.noise) if comparison.noise else 0.0
    name = short_name(comparison.metric)
    return {
        "workload": workload,
        "metric": name,
        "peer": comparison.peer,
        "verdict": comparison.verdict,
        "value": better.value,
        "low": better.low,
        "high": better.high,
        "noise_low": 1 / (1 + noise),
        "noise_high": 1 + noise,
        "noise": f"±{noise * 100:.1f} %",
        "words": f"{times(comparison.ratio.value)} {name}",
        "bounds": interval(comparison.ratio),
    }


def trend(points: Sequence[Point], theme: Theme) -> Chart:
    """The ratio in one metric of one workload over commits, a line for each placement."""
    commits = list(dict.fromkeys(p.commit for p in sorted(points, key=lambda p: p.date)))
    records = [
        {
            "commit": p.commit[:7],
            "order": commits.index(p.commit),
            "date": p.date[:10],
            "placement": p.placement,
            "peer": p.peer,
            "value": p.ratio,
            "low": p.low,
            "high": p.high,
            "words": f"{ratio(p.ratio)} ({ratio(p.low)} to {ratio(p.high)})",
        }
        for p in points
    ]
    shown = list(dict.fromkeys(commit[:7] for commit in commits))
    placements = sorted({p.placement for p in points}, key=lambda name: (name != "near", name))
    axis = alt.Axis(title=None, grid=False, labelAngle=0, labelOverlap="greedy", labelFontSize=10)
    base = alt.Chart(alt.InlineData(values=tuple(records))).encode(
        x=alt.X("commit:O", sort=shown, scale=alt.Scale(type="point", padding=0.3), axis=axis),
        detail="placement:N",
    )
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=None, tickCount=4))
    accent = theme.palette[0]
    dash = alt.StrokeDash(
        "placement:N",
        scale=alt.Scale(domain=placements, range=[[1, 0], [5, 4], [2, 2]][: len(placements)]),
        legend=None,
    )
    band = base.mark_area(opacity=0.16, color=accent).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = base.mark_line(strokeWidth=2, color=accent).encode(y=y, strokeDash=dash)
    even = base.mark_rule(strokeDash=[3, 3]).encode(
        y=alt.datum(1), x=alt.value(0), x2=alt.value("width")
    )
    dots = base.mark_point(filled=True, size=40, color=accent, opacity=1).encode(
        y=y,
        tooltip=[
            alt.Tooltip("commit:N"),
            alt.Tooltip("date:N"),
            alt.Tooltip("words:N", title="ratio"),
            alt.Tooltip("peer:N", title="best peer"),
            alt.Tooltip("placement:N", title="cores"),
        ],
    )
    return alt.layer(band, even, line, dots).properties(height=TREND_HEIGHT)
