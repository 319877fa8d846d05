"""Many disks, queues or connections in one server: what each more of them costs.

All of them are under load at once, from one sleeping client thread each on the client's core, so
that the figures are what a busy host sees: requests a second in all, CPU time a request, memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from perf import images
from perf.frontend.blk import BlkFrontend, Outcome, Pattern
from perf.frontend.connection import percentile
from perf.loads.blk import disk_of
from perf.loads.target import WARM_UP_SECONDS, ServerTarget
from perf.model import Place, Sample, Server, Target
from perf.process import Started
from perf.serving import serving

IMAGE_SIZE = 8 << 20
PATTERN = Pattern(depth=8, write_percent=50, verify=True, poll=False)
"""The stamps are checked by the client's core; the server's time is its own."""


def area(queue: int, queues: int) -> Pattern:
    """What a queue of a disk does: in an area of its own, since each knows only its own stamps."""
    span = IMAGE_SIZE // queues // PATTERN.block_size * PATTERN.block_size
    return replace(PATTERN, start=queue * span, span=span)


@dataclass(frozen=True)
class Scale:
    """`devices` disks of `queues` queues each, all connected and, if `loaded`, all under load.

    Otherwise only the first disk is used: what do the idle ones cost it?
    """

    devices: int = 1
    queues: int = 1
    loaded: bool = True

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        with ExitStack() as stack:
            disks = [
                disk_of(
                    stack.enter_context(images.opened("tmpfs", blank=True, size=IMAGE_SIZE)),
                    place,
                    queues=self.queues,
                    number=number,
                )
                for number in range(self.devices)
            ]
            launch = server.blk(disks, place.directory)
            sockets = [disk.socket for disk in disks]
            started = stack.enter_context(serving(server.name, launch, sockets, place))
            frontends = [
                stack.enter_context(
                    BlkFrontend(
                        socket,
                        depth=PATTERN.depth,
                        block_size=PATTERN.block_size,
                        queues=self.queues,
                    )
                )
                for socket in sockets
            ]
            used = frontends if self.loaded else frontends[:1]
            queues = range(self.queues)
            lanes = [(f, queue, area(queue, self.queues)) for f in used for queue in queues]
            pool = stack.enter_context(ThreadPoolExecutor(len(lanes)))
            yield _ScaleTarget(started, lanes, pool, place)


class _ScaleTarget(ServerTarget):
    """A server, and a client thread for each queue that is under load."""

    def __init__(
        self,
        server: Started,
        lanes: Sequence[tuple[BlkFrontend, int, Pattern]],
        pool: ThreadPoolExecutor,
        place: Place,
    ) -> None:
        super().__init__(server, place)
        self._lanes = lanes
        self._pool = pool

    def _run(self, seconds: float) -> list[Outcome]:
        cpu = self._place.client_cpu
        running = [
            self._pool.submit(frontend.run, pattern, seconds=seconds, queue=queue, cpu=cpu)
            for frontend, queue, pattern in self._lanes
        ]
        return [future.result() for future in running]

    def measure(self, seconds: float) -> Sample:
        began = self._server.cpu_seconds()
        warm_up = self._run(WARM_UP_SECONDS)
        start = self._server.cpu_seconds()
        outcomes = self._run(seconds)
        end = self._server.cpu_seconds()
        requests = sum(o.requests for o in outcomes)
        took = max(o.seconds for o in outcomes)
        latency = [sum(counts) for counts in zip(*(o.latency for o in outcomes), strict=True)]
        client = sum(o.driver_cpu_seconds for o in outcomes)
        return Sample(
            operations=requests,
            seconds=took,
            metrics={
                "iops": requests / took,
                "latency_p99_us": percentile(latency, 0.99),
                "server_cpu_us": (end - start) * 1e6 / requests,
                "client_cpu_us": client * 1e6 / requests,
                "memory_mib": self._server.memory_mib(),
            },
            own_cpu_seconds=end - began,
            errors=sum(o.errors for o in (*warm_up, *outcomes)),
            corrupt=sum(o.corrupt for o in (*warm_up, *outcomes)),
        )
