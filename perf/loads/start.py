"""How long a server takes from exec to its first answer, and what it costs while it waits.

A window is one start of a new process, and the look at it once it answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf import images
from perf.frontend.blk import BlkFrontend, Pattern
from perf.images import Image
from perf.loads.blk import disk_of
from perf.model import Place, Sample, Server, ServerFailed, Target
from perf.serving import directory, serving

PATTERN = Pattern(depth=4, write_percent=50, verify=True, poll=False)
REQUESTS = 2000


@dataclass(frozen=True)
class Start:
    """Exec to the answer of GET_FEATURES, with one image of this kind; then memory and idle CPU.

    `verify`: the new server also has to keep what is written to it.
    """

    image: str
    verify: bool = False

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        with images.opened(self.image, blank=True) as image:
            server.blk([disk_of(image, place)], place.directory)  # refuses now what it cannot do
            yield _StartTarget(server, image, place, verify=self.verify)


class _StartTarget:
    """Starts the server anew for each window."""

    def __init__(self, server: Server, image: Image, place: Place, *, verify: bool) -> None:
        self._server = server
        self._image = image
        self._place = place
        self._verify = verify
        self._log: Sequence[str] = ()

    def go_on(self) -> None: ...

    def rest(self) -> None: ...

    def alive(self) -> str | None:
        return None

    def log_tail(self) -> Sequence[str]:
        return self._log

    def measure(self, seconds: float) -> Sample:
        with directory(self._place.directory) as folder:
            place = Place(self._place.client_cpu, self._place.server_cpu, folder)
            disk = disk_of(self._image, place)
            launch = self._server.blk([disk], folder)
            try:
                with serving(self._server.name, launch, [disk.socket], place) as started:
                    start = time.monotonic() - started.started
                    starting = started.cpu_seconds()
                    memory = started.memory_mib()
                    time.sleep(seconds)
                    idle = started.cpu_seconds() - starting
                    corrupt = self._corrupt(disk.socket) if self._verify else 0
                    self._log = started.log_tail()
                    return Sample(
                        operations=1,
                        seconds=start + seconds,
                        metrics={
                            "start_ms": start * 1e3,
                            "memory_mib": memory,
                            "idle_cpu_share": idle / seconds,
                        },
                        own_cpu_seconds=started.cpu_seconds(),
                        corrupt=corrupt,
                    )
            except ServerFailed as error:
                self._log = error.log
                raise ConnectionError(str(error)) from None

    def _corrupt(self, socket: Path) -> int:
        """How many sectors were not what was written there, or could not be."""
        with BlkFrontend(socket, depth=PATTERN.depth, block_size=PATTERN.block_size) as frontend:
            outcome = frontend.run(PATTERN, requests=REQUESTS)
        return outcome.corrupt + outcome.errors
