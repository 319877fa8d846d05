"""TCP between the guest and the host, and ping."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .process import Process, running, while_running
from .qemu import Guest

_SERVER = ("iperf3",)


@dataclass(frozen=True)
class IperfResult:
    """What one direction came to, at the receiver. `host_cpu_share`: of a core, by iperf3 there."""

    bits_per_second: float
    received_bytes: int
    retransmits: int
    seconds: float
    host_cpu_share: float


@dataclass(frozen=True)
class PingResult:
    """What a run of pings came to; `times_us`: of those that were answered."""

    sent: int
    received: int
    mean_us: float
    worst_us: float
    times_us: Sequence[float]


@contextlib.asynccontextmanager
async def iperf_server(
    address: str, directory: Path, *, program: Sequence[str] = _SERVER
) -> AsyncIterator[Process]:
    """An iperf3 that listens for one test and then ends. `program`: how it is started."""
    server = [*program, "--server", "--one-off", "--bind", address, "--forceflush"]
    async with running("iperf3", server, directory / "iperf3.log", pipe=True) as process:
        await while_running(process, process.line_with("Server listening"), "at its start")
        yield process


async def iperf_client(
    guest: Guest, address: str, *, seconds: int, reverse: bool = False
) -> IperfResult:
    """The guest's end of a test. Raises ValueError when it fails."""
    result = await guest.run(
        f"iperf3 --client {address} --time {seconds} --json{' --reverse' if reverse else ''}",
        check=False,
    )
    report = json.loads(result.output)
    # With --json it exits with 0 even when it has failed.
    if result.code or "error" in report:
        raise ValueError(f"iperf3 (exit code {result.code}): {report.get('error', report)}")
    end = report["end"]
    return IperfResult(
        bits_per_second=end["sum_received"]["bits_per_second"],
        received_bytes=end["sum_received"]["bytes"],
        retransmits=end["sum_sent"].get("retransmits", 0),
        seconds=end["sum_received"]["seconds"],
        host_cpu_share=end["cpu_utilization_percent"]["remote_total"] / 100,
    )


async def iperf(
    guest: Guest, address: str, directory: Path, *, seconds: int, reverse: bool = False
) -> IperfResult:
    """iperf3 from the guest to a server on this address of the host, or back (``reverse``)."""
    async with iperf_server(address, directory):
        return await iperf_client(guest, address, seconds=seconds, reverse=reverse)


async def ping(guest: Guest, address: str, count: int, *, options: str = "") -> PingResult:
    """Ping from the guest, one packet a program.

    One ping of many packets waits for the last reply only twice the longest time so far: on a
    busy machine a late reply would pass for a lost one, which is what is to be told apart.
    """
    command = f"for n in $(seq {count}); do ping -c 1 -W 10 {options} {address}; done"
    return await _ping(guest, command, count)


async def ping_often(guest: Guest, address: str, count: int, *, interval_ms: int) -> PingResult:
    """Ping from the guest, all packets by one program."""
    command = f"ping -c {count} -i {interval_ms / 1000:.3f} {address}"
    return await _ping(guest, command, count)


async def _ping(guest: Guest, command: str, count: int) -> PingResult:
    result = await guest.run(command, check=False)
    times = [float(time) * 1000 for time in re.findall(r"time=([\d.]+) ms", result.output)]
    return PingResult(
        sent=count,
        received=len(times),
        mean_us=sum(times) / len(times) if times else 0.0,
        worst_us=max(times, default=0.0),
        times_us=times,
    )
