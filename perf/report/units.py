"""Metrics in the units in which people speak of them: kIOPS, Mpps, Gbit/s, µs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perf.model import METRICS
from perf.stats import Estimate

# What a metric is called where there is no room for its title.
_NAMES = {
    "latency_mean_us": "mean",
    "latency_p50_us": "p50",
    "latency_p99_us": "p99",
    "latency_p999_us": "p99.9",
    "server_cpu_us": "CPU",
    "client_cpu_us": "client CPU",
    "vmm_cpu_us": "VMM CPU",
    "server_cpu_share": "CPU",
    "vmm_cpu_share": "VMM CPU",
    "lost_share": "lost",
    "start_ms": "start",
    "memory_mib": "memory",
    "idle_cpu_share": "idle CPU",
}
# Units that take a prefix; where the unit says it all, the metric needs no other name.
_SYMBOLS = {"iops": "IOPS", "packets_per_second": "pps"}
_PREFIXED = ("IOPS", "pps", "B/s", "bit/s")
TIMES = "×"  # noqa: RUF001
_PREFIXES = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))
_LONG = 10_000


@dataclass(frozen=True)
class Scale:
    """A metric's unit with a prefix that fits the values: what `factor` of them make one."""

    metric: str
    factor: float
    unit: str

    @property
    def heading(self) -> str:
        """The metric and its unit, as over a column: "kIOPS", "p99 µs"."""
        return f"{_NAMES[self.metric]} {self.unit}" if self.metric in _NAMES else self.unit

    def format(self, value: float) -> str:
        """A value in this unit, without it."""
        return digits(value / self.factor)


def short_name(metric: str) -> str:
    """A metric in a word: "IOPS", "p99", "CPU"."""
    symbol = _SYMBOLS.get(metric, METRICS[metric].unit)
    return _NAMES.get(metric, symbol)


def scale_of(metric: str, values: Iterable[float]) -> Scale:
    """The unit of a metric: the largest of which all values are one or more, but for long ones."""
    unit = _SYMBOLS.get(metric, METRICS[metric].unit)
    if unit == "share":
        return Scale(metric, 0.01, "%")
    positive = [value for value in values if value > 0]
    if unit not in _PREFIXED or not positive:
        return Scale(metric, 1.0, unit)
    chosen = max(i for i, (factor, _) in enumerate(_PREFIXES) if not i or factor <= min(positive))
    while max(positive) >= _LONG * _PREFIXES[chosen][0] and chosen + 1 < len(_PREFIXES):
        chosen += 1
    factor, prefix = _PREFIXES[chosen]
    return Scale(metric, factor, prefix + unit)


def digits(value: float) -> str:
    """A number with three significant digits, or all that are before the point."""
    size = abs(value)
    if not size:
        return "0"
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.0095 else f"{value:.2g}"


def compact(value: float) -> str:
    """What a workload is set to: a depth, a size, in binary thousands where they are whole."""
    if value != int(value):
        return f"{value:g}"
    for factor, prefix in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if value >= max(factor, 4096) and not value % factor:
            return f"{value / factor:.0f}{prefix}"
    return f"{value:.0f}"


def ratio(value: float) -> str:
    """A ratio, with two decimals unless it is tiny."""
    return f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


def times(value: float) -> str:
    """A ratio, marked as one."""
    return ratio(value) + TIMES


def interval(estimate: Estimate) -> str:
    """The bounds of a ratio's interval."""
    return f"{ratio(estimate.low)}–{ratio(estimate.high)}"  # noqa: RUF001


def share(value: float) -> str:
    """A small share, as of noise."""
    return f"{value * 100:.1f} %" if value < 0.0995 else f"{value * 100:.0f} %"


def duration(seconds: float) -> str:
    """How long something took."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
