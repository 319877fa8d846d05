"""Block, no guest: requests on a ring in shared memory, one core for the client, one the server's.

SPDK and cloud-hypervisor's back-ends take part where ``--tool`` says where they are; fio and
qemu-img where theirs can speak vhost-user (Debian 13).
"""

from __future__ import annotations

from perf.frontend.blk import Pattern
from perf.frontend.connection import RING_FEATURES, RING_PACKED
from perf.loads.blk import NativeBlk
from perf.loads.fio import FioBlk
from perf.loads.qemu_img import QemuImgBench
from perf.model import Load, Suite, Workload

NULL = ("vdev", "qsd", "qsd-main-loop", "spdk")
TMPFS = ("vdev", "qsd", "qsd-threads", "spdk", "ch-block")
DISK = ("vdev", "qsd", "qsd-threads", "spdk")
RATE = ("iops", "server_cpu_us")
WAIT = ("latency_p50_us", "iops", "server_cpu_us")
DEPTHS = (1, 4, 16, 32, 64, 128, 256)
SHORT_SET = ("null-read-qd1", "null-read-qd32", "tmpfs-read-qd1", "tmpfs-read-qd32", "verify")


def _one(
    name: str, series: str, servers: tuple[str, ...], load: Load, *, verified: bool = False
) -> Workload:
    return Workload(name, load, servers, series, RATE, verified=verified, gate=name in SHORT_SET)


def _by_depth(
    name: str, series: str, image: str, servers: tuple[str, ...], *, write_percent: int = 0
) -> list[Workload]:
    return [
        Workload(
            f"{name}-qd{depth}",
            NativeBlk(image, Pattern(depth=depth, write_percent=write_percent)),
            servers,
            series,
            WAIT if depth == 1 else RATE,
            x=("queue depth", depth),
            seconds=1.0 if depth in (1, 32) else 0.5,
            gate=f"{name}-qd{depth}" in SHORT_SET,
        )
        for depth in DEPTHS
    ]


SUITE = Suite(
    "blk",
    "Block, no guest",
    [
        *_by_depth("null-read", "4 KiB random read, null disk", "null", NULL),
        *_by_depth("tmpfs-read", "4 KiB random read, file on tmpfs", "tmpfs", TMPFS),
        _one(
            "tmpfs-read-packed",
            "4 KiB random read, tmpfs, depth 32, packed ring",
            TMPFS,
            NativeBlk("tmpfs", Pattern(), RING_FEATURES | RING_PACKED),
        ),
        _one(
            "tmpfs-write",
            "4 KiB random write, tmpfs, depth 32",
            TMPFS,
            NativeBlk("tmpfs", Pattern(write_percent=100)),
        ),
        _one(
            "tmpfs-mixed",
            "4 KiB random, 70 % read, tmpfs, depth 32",
            TMPFS,
            NativeBlk("tmpfs", Pattern(write_percent=30)),
        ),
        _one(
            "tmpfs-sequential",
            "128 KiB sequential read, tmpfs, depth 16",
            TMPFS,
            NativeBlk("tmpfs", Pattern(depth=16, block_size=128 << 10, random=False)),
        ),
        _one(
            "tmpfs-read-sleeping",
            "4 KiB random read, tmpfs, depth 1, client sleeps",
            TMPFS,
            NativeBlk("tmpfs", Pattern(depth=1, poll=False)),
        ),
        _one(
            "disk-read-cached",
            "4 KiB random read, disk file in the page cache, depth 32",
            DISK,
            NativeBlk("disk", Pattern()),
        ),
        _one(
            "disk-read-direct",
            "4 KiB random read, disk file past the page cache, depth 32",
            DISK,
            NativeBlk("disk-direct", Pattern()),
        ),
        _one(
            "disk-write-direct",
            "4 KiB random write, disk file past the page cache, depth 32",
            DISK,
            NativeBlk("disk-direct", Pattern(write_percent=100)),
        ),
        _one(
            "verify",
            "4 KiB random, half of it written, every byte checked",
            TMPFS,
            NativeBlk("tmpfs", Pattern(write_percent=50, verify=True)),
            verified=True,
        ),
        _one(
            "fio-null-read",
            "fio (libblkio): 4 KiB random read, null disk, depth 32",
            NULL,
            FioBlk("null", "libblkio.fio", {"RW": "randread", "BS": "4k", "DEPTH": "32"}),
        ),
        _one(
            "fio-tmpfs-read",
            "fio (libblkio): 4 KiB random read, tmpfs, depth 32",
            TMPFS,
            FioBlk("tmpfs", "libblkio.fio", {"RW": "randread", "BS": "4k", "DEPTH": "32"}),
        ),
        _one(
            "qemu-img-null-read",
            "qemu-img bench: 4 KiB sequential read, null disk, depth 32",
            NULL,
            QemuImgBench("null", depth=32, block_size=4096),
        ),
    ],
)
