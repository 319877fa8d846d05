"""Runs that look like real ones, always the same: for tests, and to look at the reports.

``python -m tests.perf.sample_run DIRECTORY`` writes the reports of one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from perf.history import Point, points_of
from perf.host import Host
from perf.results import DIED, HUNG, SCHEMA, Failure, Row, Run, ServerResult, SuiteResult, Window

BASE = "vdev"
VERSIONS = {
    "vdev": "vdev 0.1.0",
    "qemu-sd": "qemu-storage-daemon version 10.0.3 (Debian 1:10.0.3+ds-0+deb13u1)",
    "qemu-sd iothread": "qemu-storage-daemon version 10.0.3 (Debian 1:10.0.3+ds-0+deb13u1)",
    "spdk": "SPDK v25.01",
    "testpmd": "DPDK 22.11.7",
    "ovs-dpdk": "ovs-vswitchd (Open vSwitch) 3.1.0",
}
LOG = ["vhost: vring 0 enabled", "vhost: avail index 41 out of range", "Aborted (core dumped)"]
NO_SPDK = "spdk_tgt is in no Debian package: name it with --tool spdk_tgt=PATH"


def windows(
    generator: random.Random, values: Mapping[str, float], rounds: int, placement: str = "near"
) -> list[Window]:
    """Windows whose metrics scatter by about a percent; one in eight with the cores moved."""
    found = []
    for number in range(rounds):
        moved = number % 8 == 5
        where = ("far" if placement == "near" else "near") if moved else placement
        ping = generator.uniform(75, 130) if where == "near" else generator.uniform(390, 430)
        slow = 0.6 if moved else 1.0
        metrics = {
            name: value * generator.gauss(1, 0.012) * (slow if "per_second" in name else 1)
            for name, value in values.items()
        }
        found.append(Window(number, metrics, 1.0, (ping, ping * 1.02), where, 0.01))
    return found


def latency(generator: random.Random, median_us: float, count: int = 20000) -> dict[int, int]:
    """A histogram with a long tail; bucket floors of two significant digits."""
    found: dict[int, int] = {}
    for _ in range(count):
        ns = generator.lognormvariate(0, 0.25) * median_us * 1e3
        if generator.random() < 0.004:
            ns *= generator.uniform(2, 30)
        digits = 10 ** max(0, len(str(int(ns))) - 2)
        floor = int(ns) // digits * digits
        found[floor] = found.get(floor, 0) + 1
    return found


def row(
    workload: str,
    series: str,
    servers: Mapping[str, Mapping[str, float]],
    *,
    compared: tuple[str, ...] = ("iops", "server_cpu_us"),
    x: tuple[str, float] | None = None,
    rounds: int = 7,
    placement: str = "near",
    requests: int = 20000,
) -> Row:
    """A row with a second instance of the first server; latency histograms where there is a p50."""
    generator = random.Random(f"{workload} {series} {x}")
    results = []
    for name, values in servers.items():
        result = ServerResult(name, VERSIONS.get(name, ""))
        result.windows = windows(generator, values, rounds, placement)
        if "latency_p50_us" in values and requests:
            result.latency = latency(generator, values["latency_p50_us"], requests)
        results.append(result)
    again = ServerResult(results[0].name, results[0].version)
    again.windows = windows(generator, next(iter(servers.values())), rounds, placement)
    return Row(
        workload=workload,
        series=series,
        compared=list(compared),
        x=x,
        wanted=min(5, rounds),
        calm_share=0.1,
        verified=True,
        servers=results,
        again=again,
    )


def block(kiops: float, p50_us: float, cpu_us: float, size: int = 4096) -> dict[str, float]:
    """The metrics of a block workload."""
    return {
        "iops": kiops * 1e3,
        "bytes_per_second": kiops * 1e3 * size,
        "latency_mean_us": p50_us * 1.1,
        "latency_p50_us": p50_us,
        "latency_p99_us": p50_us * 1.9,
        "latency_p999_us": p50_us * 4.5,
        "server_cpu_us": cpu_us,
        "client_cpu_us": 0.31,
    }


def packets(mpps: float, size: float, cpu_us: float) -> dict[str, float]:
    """The metrics of a packet workload."""
    return {
        "packets_per_second": mpps * 1e6,
        "bits_per_second": mpps * 1e6 * size * 8,
        "server_cpu_us": cpu_us,
        "lost_share": 0.0,
    }


def start(ms: float, mib: float, idle: float = 0.0) -> dict[str, float]:
    """The metrics of a server's start."""
    return {"start_ms": ms, "memory_mib": mib, "idle_cpu_share": idle}


def block_suite(rounds: int, requests: int) -> SuiteResult:
    """Depths, single rows, an absent peer, one that died, cores that moved."""
    suite = SuiteResult("blk", "Block devices, one queue, no guest")
    for depth, ours, theirs in ((1, 610, 297), (4, 1050, 700), (16, 1410, 1130), (64, 1480, 1235)):
        servers = {
            BASE: block(ours, depth * 1e3 / ours, 1e3 / ours * 0.9),
            "qemu-sd": block(theirs, depth * 1e3 / theirs, 1e3 / theirs),
            "qemu-sd iothread": block(
                theirs * 1.06, depth * 1e3 / theirs / 1.06, 1e3 / theirs * 0.97
            ),
        }
        made = row(
            f"null 4k randread, depth {depth}",
            "null 4k randread",
            servers,
            x=("depth", depth),
            rounds=rounds,
            requests=requests,
        )
        made.absent["spdk"] = NO_SPDK
        suite.rows.append(made)
    for size, ours, theirs in ((4096, 380, 216), (16384, 250, 163), (131072, 70, 73)):
        made = row(
            f"tmpfs {size // 1024}k read, depth 16",
            "tmpfs read by block size",
            {
                BASE: block(ours, 16e3 / ours, 1e3 / ours, size),
                "qemu-sd": block(theirs, 16e3 / theirs, 1.2e3 / theirs, size),
            },
            x=("block size", size),
            rounds=rounds,
            requests=requests,
        )
        made.absent["spdk"] = NO_SPDK
        suite.rows.append(made)
    direct = row(
        "disk 4k randwrite, O_DIRECT, depth 32",
        "disk, O_DIRECT",
        {
            BASE: block(50.4, 634, 5.1),
            "qemu-sd": block(50, 640, 6.8),
            "qemu-sd iothread": block(49.6, 650, 6.1),
        },
        rounds=rounds,
        requests=requests,
    )
    direct.servers[2].windows = direct.servers[2].windows[:2]
    direct.failures.append(
        Failure("qemu-sd iothread", DIED, "exited with status 134 in round 2", LOG)
    )
    suite.rows.append(direct)
    moved = row(
        "disk 4k randread, O_DIRECT, depth 32",
        "disk, O_DIRECT",
        {BASE: block(76, 419, 5.9), "qemu-sd": block(75, 421, 6.2)},
        rounds=rounds,
        requests=0,
    )
    moved.servers[0].windows = [replace(w, placement="mixed") for w in moved.servers[0].windows]
    suite.rows.append(moved)
    return suite


def net_suite(rounds: int) -> SuiteResult:
    """Packet sizes, split and packed rings; the cores are far in the latter."""
    suite = SuiteResult("net", "Network cards, one queue pair, port to port")
    for ring, factor, placement in (("split", 1.0, "near"), ("packed", 1.3, "far")):
        for size, ours, testpmd, ovs in (
            (64, 21.0, 25.1, 17.1),
            (256, 19.0, 20.0, 14.0),
            (1024, 13.1, 13.0, 10.1),
            (1518, 11.4, 10.5, 8.6),
        ):
            servers = {
                BASE: packets(ours * factor, size, 1 / ours / factor),
                "testpmd": packets(testpmd * factor, size, 1 / testpmd / factor),
                "ovs-dpdk": packets(ovs * factor, size, 1 / ovs / factor),
            }
            suite.rows.append(
                row(
                    f"{ring} ring, {size} B",
                    f"forwarding, {ring} ring",
                    servers,
                    compared=("packets_per_second", "server_cpu_us"),
                    x=("packet size", size),
                    rounds=rounds,
                    placement=placement,
                )
            )
    suite.rows[-1].servers[2].windows = [
        replace(w, others_share=0.4) for w in suite.rows[-1].servers[2].windows
    ]
    dead = row(
        "packed ring, jumbo frames",
        "forwarding, jumbo frames",
        {BASE: packets(4, 9000, 0.2), "testpmd": packets(3.6, 9000, 0.3)},
        compared=("packets_per_second",),
        rounds=rounds,
    )
    dead.servers[0].windows = []
    dead.again = None
    dead.absent["ovs-dpdk"] = "it takes no frames above 1518 bytes without mtu_request"
    dead.failures.append(Failure(BASE, HUNG, "no packet came back for 5 s", LOG[:2]))
    suite.rows.append(dead)
    return suite


def start_suite(rounds: int) -> SuiteResult:
    """A suite without operations."""
    servers = {BASE: start(118, 31.4), "qemu-sd": start(41, 22.5), "spdk": start(910, 160, 1.0)}
    return SuiteResult(
        "start",
        "Start, memory and rest",
        [row("one disk", "one disk", servers, compared=("start_ms", "memory_mib"), rounds=rounds)],
    )


def sample_run(
    rounds: int = 7, requests: int = 20000, commit: str = "8c76e5ed98a583b739cf6184d2cbad"
) -> Run:
    """A run with everything that a report has to show."""
    return Run(
        schema_version=SCHEMA,
        started="2026-11-20T14:28:06+00:00",
        seconds=1312.4,
        command=["python", "-m", "perf", "run", "blk", "net", "start"],
        commit=commit,
        machine={
            "cpu": "AMD EPYC 9B14",
            "cores": "2",
            "memory": "7.8 GiB",
            "kernel": "6.18.5",
            "hypervisor": "kvm",
            "transparent hugepages": "madvise",
        },
        host=Host("AMD EPYC 9B14", "6.18.5", system_call_ns=180.0, read_ns=760.0),
        suites=[block_suite(rounds, requests), net_suite(rounds), start_suite(rounds)],
    )


def empty_run() -> Run:
    """A run that was interrupted before its first window."""
    run = sample_run(rounds=1, requests=0)
    return replace(run, suites=[SuiteResult("blk", "Block devices")], interrupted=True)


def one_row(*rows: Row) -> Run:
    """A run of nothing but these rows."""
    return replace(sample_run(1, 0), suites=[SuiteResult("one", "One suite", list(rows))])


def at_kiops(**kiops: float) -> dict[str, dict[str, float]]:
    """Servers of a row by what they come to."""
    return {name: block(value, 10, 1e3 / value) for name, value in kiops.items()}


def sample_history(run: Run, commits: int = 9) -> list[Point]:
    """The points of a run as if earlier commits had come to a little less."""
    generator = random.Random(commits)
    found = []
    for back in range(commits, 0, -1):
        for point in points_of(run):
            factor = (1 - 0.02 * back if point.ratio > 1 else 1.0) * generator.gauss(1, 0.01)
            found.append(
                replace(
                    point,
                    commit=f"{back * 7919:07x}",
                    date=f"2026-11-{20 - back:02d}T12:00:00+00:00",
                    ratio=point.ratio * factor,
                    low=point.low * factor,
                    high=point.high * factor,
                )
            )
    return found


def main(directory: Path) -> None:
    """Writes all reports of the sample run."""
    from rich.console import Console

    from perf.report import charts, page, table

    run = sample_run()
    table.show(Console(), run)
    page.write_page(run, directory / "report.html", sample_history(run))
    for path in charts.write_pictures(run, directory):
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
