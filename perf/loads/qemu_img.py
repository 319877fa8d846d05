"""Block load by ``qemu-img bench`` through QEMU's virtio-blk-vhost-user driver.

It runs a number of requests, one after another over the disk, and tells how long they took: no
latencies. A first, short run of it tells how many requests make a window.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from perf import images
from perf.loads.blk import served_disk
from perf.loads.command import Finished, run
from perf.loads.fio import check_serves_libblkio
from perf.loads.target import ServerTarget
from perf.model import Disk, Place, Sample, Server, Target, Unsupported
from perf.process import Started
from perf.tools import find_tool

DRIVER = "virtio-blk-vhost-user"
FIRST_COUNT = 20_000


@cache
def _lacks_driver(qemu_img: str) -> bool:
    done = subprocess.run(
        [qemu_img, "bench", "-c", "1", "--image-opts", f"driver={DRIVER},path=/,cache.direct=on"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "Unknown driver" in done.stderr


@dataclass(frozen=True)
class QemuImgBench:
    """Sequential reads (or writes) of `block_size` bytes, `depth` in flight."""

    image: str
    depth: int
    block_size: int
    write: bool = False

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        qemu_img = find_tool("qemu-img")
        if _lacks_driver(qemu_img):
            raise Unsupported(
                f"this qemu-img has no {DRIVER} driver (Debian 13's qemu-block-extra has it; "
                "--tool qemu-img=PATH)"
            )
        with (
            images.opened(self.image) as image,
            served_disk(server, image, place, anew=True) as (started, disk),
        ):
            check_serves_libblkio(server, disk.socket)
            yield _BenchTarget(started, qemu_img, self, disk, place)


class _BenchTarget(ServerTarget):
    """A server, and a qemu-img that connects to it anew for each window."""

    def __init__(
        self, server: Started, qemu_img: str, load: QemuImgBench, disk: Disk, place: Place
    ) -> None:
        super().__init__(server, place)
        self._qemu_img = qemu_img
        self._load = load
        self._disk = disk

    def _bench(self, count: int, seconds: float) -> tuple[Finished, float]:
        load = self._load
        done = run(
            [
                *(self._qemu_img, "bench", "-c", str(count), "-d", str(load.depth)),
                *("-s", str(load.block_size), *(["-w"] if load.write else [])),
                "--image-opts",
                f"driver={DRIVER},path={self._disk.socket},cache.direct=on",
            ],
            cpu=self._place.client_cpu,
            seconds=seconds,
        )
        found = re.search(r"Run completed in ([\d.]+) seconds", done.output)
        if done.code or not found:
            raise OSError(f"qemu-img bench (exit code {done.code}): {done.output.strip()}")
        return done, float(found[1])

    def measure(self, seconds: float) -> Sample:
        _, first = self._bench(FIRST_COUNT, seconds)
        count = max(FIRST_COUNT, int(FIRST_COUNT * seconds / max(first, 0.001)))
        used = self._server.cpu_seconds()
        done, took = self._bench(count, seconds)
        used = self._server.cpu_seconds() - used
        # One that always polls also did while qemu-img started and ended; it has but one core.
        busy = min(used, took)
        return Sample(
            operations=count,
            seconds=done.seconds,
            metrics={
                "iops": count / took,
                "bytes_per_second": count * self._load.block_size / took,
                "server_cpu_us": busy * 1e6 / count,
                "client_cpu_us": done.cpu_seconds * 1e6 / count,
            },
            own_cpu_seconds=used + done.cpu_seconds,
        )
