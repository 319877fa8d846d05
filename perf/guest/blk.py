"""fio in a guest, on a disk under test."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perf import images
from perf.fio_output import parse
from perf.guest.backend import Backend, Beside, IothreadWithin, Used
from perf.guest.boot import boot
from perf.guest.steps import Steps
from perf.guest.target import GuestTarget
from perf.images import Image
from perf.loads.blk import disk_of
from perf.model import Place, Sample, Server, Target
from perf.servers.qemu import VirtioBlk
from perf.serving import serving
from tests.lab.devices import Disk, OwnDisk
from tests.lab.qemu import Guest

JOBS = Path(__file__).resolve().parents[1] / "fio"
DEVICE = "/dev/vdb"
WARM_UP_SECONDS = 0.3
# The default of QEMU's own virtio-blk; that of its vhost-user-blk is half of it.
_QUEUE = "queue-size=256"
_EVENT = 'sh -c "echo event {} >/dev/ttyS1"'


@dataclass(frozen=True)
class FioGuest:
    """A job file of perf/fio with these variables, in a guest on an image of this kind.

    `mib_per_second`: the job does not run for a time but over an area, which is blanked before.
    """

    image: str
    job: str
    variables: Mapping[str, str]
    mib_per_second: int = 0

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(images.opened(self.image, blank=bool(self.mib_per_second)))
            steps, guest, backend = _attached(stack, server, image, place)
            work = _Fio(guest, backend, self, image)
            steps.run(work.prepare())
            target = GuestTarget(steps, guest, backend, work)
            target.measure(WARM_UP_SECONDS)
            yield target


def _attached(
    stack: contextlib.ExitStack, server: Server, image: Image, place: Place
) -> tuple[Steps, Guest, Backend]:
    """The server with this image and a guest whose vdb it is; all end with `stack`."""
    if isinstance(server, VirtioBlk):
        assert image.file, "a null disk has no file for QEMU"
        own = OwnDisk(
            image.file, direct=image.direct, aio=server.aio, iothread=True, options=_QUEUE
        )
        steps = stack.enter_context(Steps())
        guest, vmm = boot(steps, place, disks=[own])
        return steps, guest, IothreadWithin(guest, vmm)
    disk = disk_of(image, place)
    launch = server.blk([disk], place.directory)
    started = stack.enter_context(serving(server.name, launch, [disk.socket], place))
    steps = stack.enter_context(Steps())
    guest, vmm = boot(steps, place, disks=[Disk(disk.socket, options=_QUEUE)])
    return steps, guest, Beside(started, vmm)


@dataclass
class _Fio:
    """A perf.guest.target.Work."""

    guest: Guest
    backend: Backend
    load: FioGuest
    image: Image
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def prepare(self) -> None:
        """Puts the job file into the guest; its I/O scheduler shall not sort what is measured."""
        job = (JOBS / self.load.job).read_text()
        await self.guest.run(
            f"echo none >/sys/block/{Path(DEVICE).name}/queue/scheduler\n"
            f"cat >/tmp/job.fio <<'END'\n{job}\nEND"
        )

    async def run(self, seconds: float) -> Sample:
        variables = {
            "DEVICE": DEVICE,
            "AREA": str(self.image.size),
            "SECONDS": f"{round(seconds * 1000)}ms",
            "SEED": str(next(self._seeds)),
            "BEFORE": _EVENT.format("begin"),
            "AFTER": _EVENT.format("end"),
            **self.load.variables,
        }
        if self.load.mib_per_second:
            size = round(seconds * self.load.mib_per_second) << 20
            variables["AREA"] = str(min(size, self.image.size))
            self._blank()
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        begin = asyncio.create_task(self._used_at("begin"))
        end = asyncio.create_task(self._used_at("end"))
        try:
            done = await self.guest.run(
                f"cd /tmp; {words} fio job.fio --output-format=json+", check=False
            )
            result = parse(done.output, done.code)
            used = await end - await begin
        finally:
            begin.cancel()
            end.cancel()
            await asyncio.gather(begin, end, return_exceptions=True)
        return Sample(
            operations=result.operations,
            seconds=result.seconds,
            metrics={
                **result.metrics,
                "server_cpu_us": used.server * 1e6 / result.operations,
                "vmm_cpu_us": used.vmm * 1e6 / result.operations,
            },
            own_cpu_seconds=0,
            errors=result.errors - result.corrupt,
            corrupt=result.corrupt,
            latency=result.latency,
        )

    def _blank(self) -> None:
        """Nothing of an earlier window is left that could be taken for what was written now."""
        assert self.image.file, "a null disk keeps nothing to verify"
        with self.image.file.open("r+b") as file:
            for _ in range(self.image.size >> 20):
                file.write(bytes(1 << 20))

    async def _used_at(self, event: str) -> Used:
        await self.guest.event(event)
        return self.backend.used()
