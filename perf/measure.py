"""Windows of load on several servers in turn, and what they amount to.

A round runs one window on each server, in an order that turns with the rounds, so that drift of
the machine falls on all alike. Only rounds are compared in which the two cores kept one distance
through all windows, the same in each, and in which nobody else used the cores. Where too few
such rounds can be had the busy ones count too, and the row says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import median

from perf import noise
from perf.frontend import Frontend, Load, Outcome
from perf.servers import Image, Kind, Server

DRIVER_CPU = 0
SERVER_CPU = 1
WARM_UP_SECONDS = 0.15
CALM_SHARE = 0.1  # of a core that others may use in a calm window
RETRIES = 3  # rounds at most, in multiples of those asked for


@dataclass(frozen=True)
class Row:
    """One line of the table: a load on an image, by vdev and by peers of which the best counts."""

    name: str
    image: str  # "null" or "tmpfs"
    load: Load
    peers: Sequence[Kind]
    required: bool


@dataclass(frozen=True)
class Window:
    """One server under load for one window."""

    server: str
    round: int
    outcome: Outcome
    server_cpu_seconds: float
    before: noise.Distance
    after: noise.Distance
    others_share: float  # of the core that others used most

    @property
    def cpu_us(self) -> float:
        """Server CPU time a request, in microseconds."""
        return self.server_cpu_seconds * 1e6 / self.outcome.requests

    @property
    def placement(self) -> str:
        same = self.before.placement == self.after.placement
        return self.before.placement if same else "mixed"


@dataclass
class Measured:
    """All windows of a row; medians are over the rounds that count."""

    row: Row
    wanted: int  # rounds
    rounds: list[dict[str, Window]] = field(default_factory=list)

    @property
    def calm(self) -> bool:
        """Whether enough rounds were left alone by the rest of the machine."""
        counts = _placements(r for r in self.rounds if _is_calm(r))
        return max(counts.values(), default=0) >= self.wanted

    @property
    def placement(self) -> str:
        """The distance of the cores in the rounds that count."""
        counts = _placements(r for r in self.rounds if _is_calm(r) >= self.calm)
        return max(counts, key=lambda name: counts[name]) if counts else "mixed"

    @property
    def counting(self) -> list[dict[str, Window]]:
        placement, calm = self.placement, self.calm
        if placement == "mixed":
            return []
        return [r for r in self.rounds if _placement(r) == placement and _is_calm(r) >= calm]

    def median(self, server: str, value: Callable[[Window], float]) -> float:
        return median(value(r[server]) for r in self.counting)

    @property
    def peer(self) -> str:
        """The peer with the most requests a second."""
        return max((k.name for k in self.row.peers), key=lambda n: self.median(n, iops))

    def ratio(self, value: Callable[[Window], float]) -> float:
        """The median, over rounds, of vdev's value divided by the peer's of the same round."""
        return median(value(r["vdev"]) / value(r[self.peer]) for r in self.counting)

    @property
    def failures(self) -> list[str]:
        """What this row demands and did not get."""
        found = []
        windows = [w for r in self.rounds for w in r.values()]
        if any(w.outcome.errors or w.outcome.corrupt for w in windows):
            found.append(f"{self.row.name}: requests failed")
        if not self.counting:
            return [*found, f"{self.row.name}: the cores never kept their distance"]
        if not self.row.required:
            return found
        if self.ratio(iops) < 1.0:
            found.append(f"{self.row.name}: IOPS {self.ratio(iops):.2f} of {self.peer}'s")
        if self.ratio(cpu_us) > 1.0:
            found.append(
                f"{self.row.name}: CPU a request {self.ratio(cpu_us):.2f} of {self.peer}'s"
            )
        return found


def iops(window: Window) -> float:
    return window.outcome.iops


def cpu_us(window: Window) -> float:
    return window.cpu_us


def _is_calm(windows: dict[str, Window]) -> bool:
    return max(w.others_share for w in windows.values()) <= CALM_SHARE


def _placements(rounds: Iterable[dict[str, Window]]) -> Counter[str]:
    counts = Counter(_placement(r) for r in rounds)
    del counts["mixed"]
    return counts


def _placement(windows: dict[str, Window]) -> str:
    placements = {w.placement for w in windows.values()}
    return placements.pop() if len(placements) == 1 else "mixed"


def window(server: Server, frontend: Frontend, load: Load, number: int) -> Window:
    """Runs one window on `server`, which sleeps before and after."""
    before = noise.measure(DRIVER_CPU, SERVER_CPU)
    server.go_on()
    try:
        warm_up = Load(**{**load.__dict__, "seconds": WARM_UP_SECONDS})
        frontend.run(warm_up, cpu=DRIVER_CPU)
        busy = [noise.busy_seconds(cpu) for cpu in (DRIVER_CPU, SERVER_CPU)]
        cpu = server.cpu_seconds()
        outcome = frontend.run(load, cpu=DRIVER_CPU)
        cpu = server.cpu_seconds() - cpu
        driver_busy = noise.busy_seconds(DRIVER_CPU) - busy[0]
        server_busy = noise.busy_seconds(SERVER_CPU) - busy[1]
    finally:
        server.stop()
    return Window(
        server=server.kind.name,
        round=number,
        outcome=outcome,
        server_cpu_seconds=cpu,
        before=before,
        after=noise.measure(DRIVER_CPU, SERVER_CPU),
        others_share=max(driver_busy - outcome.driver_cpu_seconds, server_busy - cpu)
        / outcome.seconds,
    )


def measure(
    row: Row,
    vdev: Kind,
    image: Callable[[], AbstractContextManager[Image]],
    pairs: int,
    progress: Callable[[str], None],
) -> Measured:
    """Runs `row` until `pairs` rounds count, or the machine did not keep still for long enough.

    Each server gets an image of its own, since each locks what it serves.

    Raises TimeoutError or OSError when a server does not start or stops answering.
    """
    measured = Measured(row, pairs)
    with ExitStack() as stack:
        servers = []
        for kind in (vdev, *row.peers):
            disk = stack.enter_context(image())
            server = stack.enter_context(Server(kind, disk, cpu=SERVER_CPU))
            server.go_on()
            frontend = stack.enter_context(Frontend(server.path))
            server.stop()
            servers.append((server, frontend))
        for number in range(RETRIES * pairs):
            turn = number % len(servers)
            done = {}
            for server, frontend in servers[turn:] + servers[:turn]:
                progress(f"{row.name}: round {number + 1}, {server.kind.name}")
                done[server.kind.name] = window(server, frontend, row.load, number)
            measured.rounds.append(done)
            if measured.calm:
                break
        for server, _ in servers:
            server.go_on()
    return measured
