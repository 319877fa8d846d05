"""What a run came to: every window as it was measured, and what follows from them.

Only rounds are compared in which the two cores kept one distance through all windows, the same in
each, and in which nobody else used the cores. Where too few such rounds could be had the busy ones
count too, and the row says so (`calm`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from perf.errors import PerfError
from perf.host import Host
from perf.model import METRICS
from perf.stats import Estimate, estimate, ratio

SCHEMA = 2
MIXED = "mixed"
DIED, HUNG, WRONG_DATA, REFUSED = "died", "hung", "wrong data", "refused"
ERRORS = "errors"


class ResultsError(PerfError):
    """A results file that is none, or of another version."""


@dataclass(frozen=True)
class Window:
    """One server under load for one window; `ping_ns`: the cores' distance before and after."""

    round: int
    metrics: dict[str, float]
    seconds: float
    ping_ns: tuple[float, float]
    placement: str
    others_share: float


@dataclass(frozen=True)
class Failure:
    """What a server did instead of its work, and the last lines of its log."""

    server: str
    kind: str
    message: str
    log: list[str] = field(default_factory=list)


@dataclass
class ServerResult:
    """All windows of one server in a row; `latency`: ns (bucket floor) → requests, all windows."""

    name: str
    version: str
    windows: list[Window] = field(default_factory=list)
    latency: dict[int, int] = field(default_factory=dict)


@dataclass
class Row:
    """A workload on all its servers. `servers` is in the workload's order; the first is the base.

    `again` is a second instance of the base: what differs between the two is noise.
    `absent`: servers that could not be had here, and why.
    """

    workload: str
    series: str
    compared: list[str]
    x: tuple[str, float] | None
    wanted: int
    calm_share: float
    verified: bool
    servers: list[ServerResult] = field(default_factory=list)
    again: ServerResult | None = None
    absent: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def base(self) -> ServerResult | None:
        """The server that the others are compared with, if it was measured."""
        return self.servers[0] if self.servers and self.servers[0].windows else None

    @property
    def peers(self) -> list[ServerResult]:
        """The other servers that were measured."""
        return [server for server in self.servers[1:] if server.windows]

    def _rounds(self) -> dict[int, list[Window]]:
        rounds: dict[int, list[Window]] = {}
        for server in [*self.servers, *([self.again] if self.again else [])]:
            for window in server.windows:
                rounds.setdefault(window.round, []).append(window)
        return rounds

    def _is_calm(self, windows: Iterable[Window]) -> bool:
        return all(window.others_share <= self.calm_share for window in windows)

    def _placements(self, *, calm: bool) -> Counter[str]:
        counts = Counter(
            placement_of(windows)
            for windows in self._rounds().values()
            if not calm or self._is_calm(windows)
        )
        del counts[MIXED]
        return counts

    @property
    def calm(self) -> bool:
        """Whether enough rounds were left alone by the rest of the machine."""
        return max(self._placements(calm=True).values(), default=0) >= self.wanted

    @property
    def placement(self) -> str:
        """The distance of the cores in the rounds that count, or "mixed" if none does."""
        counts = self._placements(calm=self.calm)
        return max(counts, key=lambda name: counts[name]) if counts else MIXED

    @property
    def counting(self) -> set[int]:
        """The numbers of the rounds that count."""
        placement, calm = self.placement, self.calm
        return {
            number
            for number, windows in self._rounds().items()
            if placement != MIXED
            and placement_of(windows) == placement
            and (self._is_calm(windows) or not calm)
        }

    @property
    def rounds(self) -> int:
        """How many rounds were run."""
        return len(self._rounds())

    def estimate(self, server: ServerResult, metric: str) -> Estimate | None:
        """A server's median of a metric, or None where no round counts or it has no such metric."""
        counting = self.counting
        values = [
            window.metrics[metric]
            for window in server.windows
            if window.round in counting and metric in window.metrics
        ]
        return estimate(values) if values else None

    def ratio(self, above: ServerResult, below: ServerResult, metric: str) -> Estimate | None:
        """The median over rounds of one server's value divided by another's of the same round."""
        counting = self.counting
        others = {w.round: w.metrics for w in below.windows if w.round in counting}
        pairs = [
            (w.metrics[metric], others[w.round][metric])
            for w in above.windows
            if w.round in others and others[w.round].get(metric) and metric in w.metrics
        ]
        return ratio(*zip(*pairs, strict=True)) if pairs else None

    def noise(self, metric: str) -> Estimate | None:
        """The ratio of the base to its second instance: 1 but for noise."""
        return self.ratio(self.again, self.base, metric) if self.again and self.base else None

    def best_peer(self, metric: str) -> ServerResult | None:
        """The peer that does best in a metric."""
        sign = 1 if METRICS[metric].better == "higher" else -1
        found = [(sign * e.value, p) for p in self.peers if (e := self.estimate(p, metric))]
        return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclass
class SuiteResult:
    """The rows of one suite."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)


@dataclass
class Run:
    """One call of ``python -m perf run``. `started`: ISO 8601; `machine`: facts by name, to be
    read; `host`: those that tell whether ratios compare."""

    schema_version: int
    started: str
    seconds: float
    command: list[str]
    commit: str
    machine: dict[str, str]
    host: Host
    suites: list[SuiteResult] = field(default_factory=list)
    interrupted: bool = False

    @property
    def failures(self) -> list[tuple[Row, Failure]]:
        """Every server that died, hung, refused or returned wrong data."""
        return [(r, f) for suite in self.suites for r in suite.rows for f in r.failures]


def placement_of(windows: Iterable[Window]) -> str:
    """The one distance that all these windows had, or "mixed"."""
    placements = {window.placement for window in windows}
    return placements.pop() if len(placements) == 1 else MIXED


@dataclass
class _Version:
    schema_version: int


_RUN: TypeAdapter[Run] = TypeAdapter(Run)
_VERSION: TypeAdapter[_Version] = TypeAdapter(_Version)


def write(run: Run, path: Path) -> None:
    """Writes a run as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_RUN.dump_json(run, indent=1) + b"\n")


def read(path: Path) -> Run:
    """Reads a run. Raises ResultsError when the file holds none."""
    try:
        content = path.read_bytes()
        version = _VERSION.validate_json(content).schema_version
        if version != SCHEMA:
            raise ResultsError(f"{path} is of version {version}, this reads {SCHEMA}")
        return _RUN.validate_json(content)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultsError(f"{path} is no results file: {where}: {first['msg']}") from None
