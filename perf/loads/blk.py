"""Block load by the native driver: what a guest's virtio-blk driver does, without the guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from perf import images
from perf.frontend.blk import BlkFrontend, Pattern
from perf.frontend.connection import RING_FEATURES, by_floor, percentile
from perf.images import Image
from perf.loads.target import WARM_UP_SECONDS, ServerTarget
from perf.model import Disk, Place, Sample, Server, Target, Unsupported
from perf.process import Started
from perf.serving import serving


class BlkTarget(ServerTarget):
    """A server, and the native driver on its first queue."""

    def __init__(
        self, server: Started, frontend: BlkFrontend, pattern: Pattern, place: Place
    ) -> None:
        super().__init__(server, place)
        self._frontend = frontend
        self._pattern = pattern

    def measure(self, seconds: float) -> Sample:
        run, cpu = self._frontend.run, self._place.client_cpu
        began = self._server.cpu_seconds()
        warm_up = run(self._pattern, seconds=WARM_UP_SECONDS, cpu=cpu)
        start = self._server.cpu_seconds()
        outcome = run(self._pattern, seconds=seconds, cpu=cpu)
        end = self._server.cpu_seconds()
        requests = outcome.requests
        return Sample(
            operations=requests,
            seconds=outcome.seconds,
            metrics={
                "iops": requests / outcome.seconds,
                "bytes_per_second": outcome.bytes / outcome.seconds,
                "latency_p50_us": percentile(outcome.latency, 0.5),
                "latency_p99_us": percentile(outcome.latency, 0.99),
                "latency_p999_us": percentile(outcome.latency, 0.999),
                "server_cpu_us": (end - start) * 1e6 / requests,
                "client_cpu_us": outcome.driver_cpu_seconds * 1e6 / requests,
            },
            own_cpu_seconds=end - began,
            errors=outcome.errors + warm_up.errors,
            corrupt=outcome.corrupt + warm_up.corrupt,
            latency=by_floor(outcome.latency),
        )


def disk_of(image: Image, place: Place, *, queues: int = 1, number: int = 0) -> Disk:
    """The image as a disk at a socket of the place's directory."""
    socket = place.directory / f"disk{number}"
    return Disk(socket, image.size, image.file, direct=image.direct, queues=queues)


@contextlib.contextmanager
def served_disk(
    server: Server, image: Image, place: Place, *, anew: bool = False
) -> Iterator[tuple[Started, Disk]]:
    """The server with this image as its only disk. `anew`: connected to for each window anew."""
    disk = disk_of(image, place)
    launch = server.blk([disk], place.directory)
    if anew and launch.one_connection:
        raise Unsupported(f"{server.name} ends with its first connection; this makes several")
    with serving(server.name, launch, [disk.socket], place) as started:
        yield started, disk


@dataclass(frozen=True)
class NativeBlk:
    """The native driver with this pattern on an image of this kind (perf/images.py).

    `features`: of the ring; only servers that offer the layout among them take part.
    """

    image: str
    pattern: Pattern
    features: int = RING_FEATURES

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        with (
            images.opened(self.image, blank=self.pattern.verify) as image,
            served_disk(server, image, place) as (started, disk),
            BlkFrontend(
                disk.socket,
                depth=self.pattern.depth,
                block_size=self.pattern.block_size,
                features=self.features,
            ) as frontend,
        ):
            frontend.require(self.features, server.name)
            yield BlkTarget(started, frontend, self.pattern, place)
