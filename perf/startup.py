"""How long a server takes from exec to its first answer."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from perf.servers import Image, Kind, Server

LIMIT_SECONDS = 0.2
IMAGE = Image(size=1 << 30)


@dataclass(frozen=True)
class Startup:
    """Seconds from exec to the answer of GET_FEATURES, run by run."""

    server: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(kind: Kind, runs: int) -> Startup:
    """Starts and ends the server `runs` times, on any core."""
    seconds = []
    for _ in range(runs):
        with Server(kind, IMAGE, cpu=None) as server:
            seconds.append(server.start_seconds)
    return Startup(kind.name, seconds)
