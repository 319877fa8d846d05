"""``make perf-gate``: the short set against what is stored in perf/baseline.json.

Ratios to a peer that was measured side by side carry from machine to machine of one kind, where
absolute figures do not; they are stored for each kind of host (perf/host.py) and distance of the
cores. Instructions a request of the ring code carry between all machines with an equal toolchain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from perf.comparison import Change, noise_of
from perf.errors import PerfError
from perf.host import Host
from perf.instructions import Instructions, Toolchain
from perf.model import Suite, Workload
from perf.results import Row, Run
from perf.stats import Estimate
from perf.suites import all_suites

BASELINE = Path(__file__).with_name("baseline.json")
RATIO_THRESHOLD = 0.15
INSTRUCTION_THRESHOLD = 0.01
SECONDS = 0.5
MOST = 2
"""Rounds at most, in multiples of those that must count: a busy machine shall not take longer."""
SERVERS = 2
"""Of each workload: the base and its first peer, which keeps the whole under five minutes."""


@dataclass(frozen=True)
class StoredRatio:
    """The base's ratio to a peer in a metric, with the cores at this distance."""

    workload: str
    metric: str
    peer: str
    placement: str
    ratio: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.workload, self.metric, self.peer, self.placement)


@dataclass
class Measured:
    """What a kind of host showed. `peers`: name → version."""

    host: Host
    peers: dict[str, str] = field(default_factory=dict)
    ratios: list[StoredRatio] = field(default_factory=list)


@dataclass
class Baseline:
    """What is stored; `instructions`: a request, by scenario, with this toolchain."""

    hosts: list[Measured] = field(default_factory=list)
    toolchain: Toolchain | None = None
    instructions: dict[str, float] = field(default_factory=dict)

    def measured_on(self, host: Host) -> Measured | None:
        """What is stored of a host of this kind: of several, of the most alike in its costs."""
        alike = [stored for stored in self.hosts if not stored.host.unlike(host)]
        return min(alike, key=lambda stored: stored.host.apart(host), default=None)


_BASELINE: TypeAdapter[Baseline] = TypeAdapter(Baseline)


def read(path: Path) -> Baseline:
    """Reads a baseline. Raises PerfError when the file holds none."""
    try:
        return _BASELINE.validate_json(path.read_bytes())
    except OSError as error:
        raise PerfError(f"{path}: {error.strerror}; make one with gate --update") from None
    except ValidationError as error:
        raise PerfError(f"{path} is no baseline: {error.errors()[0]['msg']}") from None


def write(baseline: Baseline, path: Path) -> None:
    """Writes a baseline, sorted, so that its changes can be read."""
    for measured in baseline.hosts:
        measured.ratios.sort(key=lambda stored: stored.key)
    path.write_bytes(_BASELINE.dump_json(baseline, indent=1) + b"\n")


def plan() -> list[tuple[Suite, list[Workload]]]:
    """The workloads of the short set, each with its first servers."""
    return [
        (suite, short)
        for suite in all_suites().values()
        if (
            short := [
                replace(workload, servers=workload.servers[:SERVERS])
                for workload in suite.workloads
                if workload.gate
            ]
        )
    ]


def ratios_of(run: Run) -> Iterable[tuple[Row, StoredRatio, Estimate]]:
    """Every ratio of the base to a peer that a run holds."""
    for row in (row for suite in run.suites for row in suite.rows):
        for peer in row.peers if row.base else ():
            for metric in row.compared:
                assert row.base
                found = row.ratio(row.base, peer, metric)
                if found:
                    name = row.workload
                    stored = StoredRatio(name, metric, peer.name, row.placement, found.value)
                    yield row, stored, found


def changes(baseline: Baseline, run: Run) -> tuple[list[Change], list[str]]:
    """The ratios against the stored ones, and what could not be compared."""
    measured = baseline.measured_on(run.host)
    if measured is None:
        differ = [", ".join(run.host.unlike(stored.host)) for stored in baseline.hosts]
        why = f" ({'; or '.join(differ)})" if differ else ""
        return [], [f"ratios: no baseline of a host like this{why}; gate --update adds one"]
    known = {stored.key: stored.ratio for stored in measured.ratios}
    compared, left = [], []
    for row, now, found in ratios_of(run):
        what = f"{row.servers[0].name} / {now.peer}"
        past = known.get(now.key)
        version = _versions(row)[now.peer]
        if not past:
            left.append(f"{now.workload}, {now.metric}, {what}: no baseline for {now.placement}")
        elif measured.peers[now.peer] != version:
            of = measured.peers[now.peer]
            left.append(f"{now.workload}, {now.metric}, {what}: baseline with {of}, not {version}")
        else:
            noise = noise_of(row, now.metric, found)
            change = Estimate(found.value / past, found.low / past, found.high / past, found.count)
            compared.append(Change(now.workload, now.metric, what, now.placement, change, noise))
    return compared, left


def _versions(row: Row) -> dict[str, str]:
    return {peer.name: peer.version for peer in row.peers}


def instruction_changes(baseline: Baseline, counted: Instructions) -> tuple[list[str], list[str]]:
    """The scenarios that cost more than stored, and what could not be compared."""
    if baseline.toolchain != counted.toolchain:
        stored = baseline.toolchain.compiler if baseline.toolchain else "none"
        return [], [f"instructions: counted with {counted.toolchain.compiler}, baseline {stored}"]
    worse, left = [], []
    for scenario, now in counted.per_request.items():
        past = baseline.instructions.get(scenario)
        if past is None:
            left.append(f"instructions of {scenario}: no baseline")
        elif now > past * (1 + INSTRUCTION_THRESHOLD):
            worse.append(f"{scenario}: {now:.1f} instructions a request, baseline {past:.1f}")
    return worse, left


def update(baseline: Baseline, run: Run, counted: Instructions) -> Baseline:
    """The baseline with what is known now. Ratios at the other distance stay, and those of other
    kinds of host; of a peer's other version none does.

    Ratios of busy rows are not worth storing.
    """
    past = baseline.measured_on(run.host) or Measured(run.host)
    calm = [(row, stored) for row, stored, _ in ratios_of(run) if row.calm]
    peers = past.peers | {name: v for row, _ in calm for name, v in _versions(row).items()}
    ratios = {
        stored.key: stored
        for stored in past.ratios
        if past.peers[stored.peer] == peers[stored.peer]
    }
    ratios |= {stored.key: stored for _, stored in calm}
    now = Measured(run.host if calm else past.host, peers, list(ratios.values()))
    others = [measured for measured in baseline.hosts if measured is not past]
    hosts = [*others, now] if now.ratios else others
    return Baseline(hosts, counted.toolchain, dict(counted.per_request))
