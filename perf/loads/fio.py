"""Block load by fio's libblkio engine, which speaks vhost-user without a guest."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from perf import images
from perf.fio_output import FioOutputError, parse
from perf.frontend.connection import Connection
from perf.loads.blk import served_disk
from perf.loads.command import run
from perf.loads.target import ServerTarget
from perf.model import Place, Sample, Server, Target, Unsupported
from perf.process import Started
from perf.tools import find_tool
from vdev._native import lib

JOBS = Path(__file__).resolve().parents[1] / "fio"
ENGINE = "libblkio"


@cache
def _engines(fio: str) -> str:
    done = subprocess.run([fio, "--enghelp"], capture_output=True, text=True, check=False)
    return done.stdout


def check_serves_libblkio(server: Server, socket: Path) -> None:
    """Raises Unsupported where libblkio would not connect."""
    needed = lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
    with Connection(socket) as connection:
        if not connection.frontend.offered_protocol() >> needed & 1:
            raise Unsupported(f"{server.name} has no memory slots, which libblkio needs")


@dataclass(frozen=True)
class FioBlk:
    """A job file of perf/fio with these variables, on an image of this kind."""

    image: str
    job: str
    variables: Mapping[str, str]

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        fio = find_tool("fio")
        if ENGINE not in _engines(fio):
            raise Unsupported(
                "this fio was built without libblkio, as Debian's is: build one, --tool fio=PATH"
            )
        with (
            images.opened(self.image) as image,
            served_disk(server, image, place, anew=True) as (started, disk),
        ):
            check_serves_libblkio(server, disk.socket)
            variables = {**self.variables, "SOCKET": str(disk.socket)}
            yield _FioTarget(started, [fio, str(JOBS / self.job)], variables, place)


class _FioTarget(ServerTarget):
    """A server, and a fio that connects to it anew for each window."""

    def __init__(
        self, server: Started, command: list[str], variables: Mapping[str, str], place: Place
    ) -> None:
        super().__init__(server, place)
        self._command = command
        self._variables = variables

    def measure(self, seconds: float) -> Sample:
        used = self._server.cpu_seconds()
        done = run(
            [*self._command, "--output-format=json+"],
            cpu=self._place.client_cpu,
            environment={**self._variables, "SECONDS": f"{round(seconds * 1000)}ms"},
            seconds=seconds,
        )
        used = self._server.cpu_seconds() - used
        try:
            job = parse(done.output, done.code)
        except FioOutputError as error:
            raise OSError(f"fio (exit code {done.code}): {error}") from None
        # One that always polls also did while fio started and ended; it has but one core.
        busy = min(used, job.seconds)
        return Sample(
            operations=job.operations,
            seconds=done.seconds,
            metrics={
                **job.metrics,
                "server_cpu_us": busy * 1e6 / job.operations,
                "client_cpu_us": done.cpu_seconds * 1e6 / job.operations,
            },
            own_cpu_seconds=used + done.cpu_seconds,
            errors=job.errors,
            latency=job.latency,
        )
