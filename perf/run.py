"""Runs workloads: windows on several servers in turn, round by round.

A round runs one window on each server, in an order that turns with the rounds, so that drift of
the machine falls on all alike. The base server is there twice: what its two instances differ by
is noise. Which rounds count is decided by what is recorded of each window (perf/results.py).

A server that dies, hangs or returns wrong data leaves the row; the rest of the row, and of the
run, goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from perf import noise, results, servers
from perf.model import Place, Sample, ServerFailed, Suite, Target, Unsupported, Workload
from perf.results import Failure, Row, ServerResult, Window
from perf.serving import directory
from perf.tools import ToolMissing
from vdev.errors import PeerError


@dataclass(frozen=True)
class Options:
    """How long and how often. `seconds`: of a window, or None = the workload's own.

    `pairs`: rounds that must count; `most`: rounds at most, in multiples of these.
    """

    pairs: int = 5
    most: int = 3
    seconds: float | None = None
    again: bool = True
    cpus: tuple[int, int] = (0, 1)


Progress = Callable[[str, float], None]
"""Told what is being done, and which share of the suite is finished."""


@dataclass
class _Seat:
    """A server's place in a row: its target while it can be measured, and its results."""

    result: ServerResult
    target: Target


class _RowRun:
    """One workload on its servers."""

    def __init__(self, suite: Suite, workload: Workload, options: Options) -> None:
        self._workload = workload
        self._options = options
        self._stack = ExitStack()
        self._seats: list[_Seat] = []
        self.row = Row(
            workload=workload.name,
            series=workload.series,
            compared=list(workload.compared),
            x=workload.x,
            wanted=options.pairs,
            calm_share=suite.calm_share,
            verified=workload.verified,
        )

    def run(self, names: Sequence[str], progress: Progress) -> Row:
        with self._stack:
            for name in names:
                progress(f"starting {name}", 0)
                self._attach(name, self.row.servers.append)
                if name == names[0] and not self._seats:
                    # A base that cannot be had keeps its place: no peer is taken for it.
                    self.row.servers.append(ServerResult(name, ""))
            if self._options.again and self._seats and self._seats[0].result.name == names[0]:
                progress(f"starting {names[0]} again", 0)
                self._attach(names[0], self._set_again)
            wanted = self._options.pairs
            for number in range(self._options.most * wanted):
                turn = number % max(1, len(self._seats))
                for seat in self._seats[turn:] + self._seats[:turn]:
                    progress(f"round {number + 1}, {seat.result.name}", min(number / wanted, 0.95))
                    self._window(seat, number)
                if not self._seats or self.row.calm:
                    break
        return self.row

    def _set_again(self, result: ServerResult) -> None:
        self.row.again = result

    def _attach(self, name: str, keep: Callable[[ServerResult], None]) -> None:
        server = servers.find(name)
        options = self._options
        try:
            place = Place(*options.cpus, self._stack.enter_context(directory()))
            target = self._stack.enter_context(self._workload.load.attach(server, place))
            target.rest()
        except (Unsupported, ToolMissing) as reason:
            self.row.absent[name] = str(reason)
        except ServerFailed as error:
            self._fail(name, results.DIED, str(error), error.log)
        except (OSError, PeerError) as error:
            self._fail(name, results.REFUSED, str(error), [])
        else:
            result = ServerResult(name, server.version())
            keep(result)
            self._seats.append(_Seat(result, target))

    def _fail(self, name: str, kind: str, message: str, log: Sequence[str]) -> None:
        self.row.failures.append(Failure(name, kind, message, list(log)))

    def _window(self, seat: _Seat, number: int) -> None:
        workload, cpus = self._workload, self._options.cpus
        target, result = seat.target, seat.result
        before = noise.measure(*cpus)
        target.go_on()
        try:
            busy, ours, clock = noise.busy_seconds(*cpus), time.process_time(), time.monotonic()
            sample = target.measure(self._options.seconds or workload.seconds)
            clock = time.monotonic() - clock
            ours = time.process_time() - ours + sample.own_cpu_seconds
            busy = noise.busy_seconds(*cpus) - busy
        except (OSError, PeerError) as error:
            self._leave(seat, error)
            return
        finally:
            target.rest()
        self._check(seat, sample)
        after = noise.measure(*cpus)
        placements = {before.placement, after.placement}
        result.windows.append(
            Window(
                round=number,
                metrics=dict(sample.metrics),
                seconds=sample.seconds,
                ping_ns=(before.round_trip_ns, after.round_trip_ns),
                placement=placements.pop() if len(placements) == 1 else results.MIXED,
                others_share=max(0.0, busy - ours) / clock,
            )
        )
        for floor, count in sample.latency.items():
            result.latency[floor] = result.latency.get(floor, 0) + count

    def _check(self, seat: _Seat, sample: Sample) -> None:
        """A fast wrong answer is a failure, and so is a request that failed; the server leaves."""
        if sample.corrupt or sample.errors:
            kind = results.WRONG_DATA if sample.corrupt else results.ERRORS
            said = f"{sample.errors} errors, {sample.corrupt} wrong of {sample.operations}"
            self._fail(seat.result.name, kind, said, seat.target.log_tail())
            self._seats.remove(seat)

    def _leave(self, seat: _Seat, error: Exception) -> None:
        ended = seat.target.alive()
        hung = isinstance(error, TimeoutError) and ended is None
        kind = results.DIED if ended else results.HUNG if hung else results.REFUSED
        message = f"{ended} ({error})" if ended else str(error)
        self._fail(seat.result.name, kind, message, seat.target.log_tail())
        self._seats.remove(seat)


def run_suite(
    suite: Suite,
    workloads: Sequence[Workload],
    options: Options,
    chosen: Sequence[str],
    extra: Sequence[str],
    progress: Progress,
    keep: Callable[[Row], None],
) -> None:
    """Runs workloads of a suite, and gives each row to `keep` when it is there.

    `extra`: servers that every workload has beside its own. `chosen`: only these, in this order.
    """
    for index, workload in enumerate(workloads):
        possible = [*workload.servers, *extra]
        wanted = [name for name in chosen if name in possible] if chosen else possible
        start, step = index / len(workloads), 1 / len(workloads)

        def tell(
            what: str,
            share: float,
            workload: Workload = workload,
            start: float = start,
            step: float = step,
        ) -> None:
            progress(f"{workload.name}: {what}", start + share * step)

        if wanted:
            keep(_RowRun(suite, workload, options).run(wanted, tell))
    progress(f"{suite.name} done", 1.0)
