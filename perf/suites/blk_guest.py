"""Block in a guest: fio in a stock Debian guest, on a disk that vdev, qemu-storage-daemon or QEMU
itself serves.

Without KVM the guest's processor is emulated, and it limits most of these; then they say whether
a server is in the guest's way, and what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from perf.guest.blk import FioGuest
from perf.model import Suite, Workload

OTHERS = ("vdev", "qsd", "qemu-virtio-blk")
ALL = ("vdev", "qsd", "qsd-main-loop", "qemu-virtio-blk", "qemu-virtio-blk-threads")
RATE = ("iops", "latency_p99_us", "server_cpu_us", "vmm_cpu_us")
WAIT = ("latency_p50_us", "latency_p99_us", "server_cpu_us", "vmm_cpu_us")
SECONDS = 1.0


def _timed(
    name: str,
    series: str,
    servers: Sequence[str],
    *,
    image: str = "tmpfs",
    rw: str = "randread",
    bs: str = "4k",
    depth: int = 32,
) -> Workload:
    variables = {"RW": rw, "BS": bs, "DEPTH": str(depth)}
    load = FioGuest(image, "timed.fio", variables)
    return Workload(name, load, servers, series, WAIT if depth == 1 else RATE, seconds=SECONDS)


SUITE = Suite(
    "blk-guest",
    "Block, in a guest",
    [
        _timed("randread-qd1", "4 KiB random read, tmpfs, depth 1", OTHERS, depth=1),
        _timed("randread-qd32", "4 KiB random read, tmpfs, depth 32", ALL),
        _timed("randwrite-qd32", "4 KiB random write, tmpfs, depth 32", OTHERS, rw="randwrite"),
        _timed(
            "read-128k-qd16",
            "128 KiB sequential read, tmpfs, depth 16",
            OTHERS,
            rw="read",
            bs="128k",
            depth=16,
        ),
        _timed(
            "disk-randread-qd32",
            "4 KiB random read, disk file past the page cache, depth 32",
            OTHERS,
            image="disk-direct",
        ),
        Workload(
            "verify",
            FioGuest("tmpfs", "verify.fio", {"BS": "4k-64k", "DEPTH": "32"}, mib_per_second=48),
            OTHERS,
            "4-64 KiB random write, read back, every block checked by crc32c",
            ("bytes_per_second", "server_cpu_us"),
            seconds=SECONDS,
            verified=True,
        ),
    ],
    calm_share=0.2,
)
