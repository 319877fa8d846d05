"""iperf3, ping and a checked stream in a guest, on a network card under test.

The host's end is on a bridge, in a network namespace that the server (or QEMU) has to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.guest.backend import Backend, Beside, MainLoopWithin, Used
from perf.guest.boot import boot
from perf.guest.steps import Steps
from perf.guest.target import GuestTarget, Work
from perf.guest.wire import GUEST_CIDR, HOST, MAC, TAP, Wire
from perf.model import Place, Port, Sample, Server, Target, Unsupported
from perf.servers.qemu import VirtioNet
from perf.serving import serving
from perf.tools import find_tool
from tests.lab import host
from tests.lab.devices import Nic, OwnNic
from tests.lab.iperf import iperf_client, iperf_server, ping_often
from tests.lab.process import running
from tests.lab.qemu import Guest

MIB = 1 << 20
PING_INTERVAL_MS = 5
STREAM_MIB_PER_SECOND = 8
WARM_UP_SECONDS = 0.5


@dataclass(frozen=True)
class Link:
    """A guest whose eth0 is served by `backend`, and the network that it is on."""

    guest: Guest
    backend: Backend
    wire: Wire
    place: Place

    def host_end(self, *program: str) -> list[str]:
        """The command for a program of the host's end: on the server's core."""
        pinned = [find_tool("taskset"), "-c", str(self.place.server_cpu), *program]
        return self.wire.command(pinned)

    async def prepare(self) -> None:
        """Gives the guest its address."""
        await self.guest.run(
            f"ip address add {GUEST_CIDR} dev eth0 && ip link set eth0 up"
            f" && ping -q -c 1 -W 10 {HOST}"
        )


@dataclass(frozen=True)
class NetGuest:
    """A guest with a network card that does this kind of work."""

    work: Callable[[Link], Work]

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        if lacks := host.lacks_network():
            raise Unsupported(lacks)
        with contextlib.ExitStack() as stack:
            steps, link = _attached(stack, server, place)
            steps.run(link.prepare())
            target = GuestTarget(steps, link.guest, link.backend, self.work(link))
            target.measure(WARM_UP_SECONDS)
            yield target


def _attached(stack: contextlib.ExitStack, server: Server, place: Place) -> tuple[Steps, Link]:
    """The server with one port, and a guest whose eth0 it is; all end with `stack`."""
    if isinstance(server, VirtioNet):
        steps = stack.enter_context(Steps())
        wrapper = [find_tool("unshare"), "--net", "--"]
        guest, vmm = boot(steps, place, nics=[OwnNic(TAP, MAC)], wrapper=wrapper)
        wire = Wire(vmm.pid)
        wire.bridge_tap()
        backend: Backend = MainLoopWithin(guest, vmm)
    else:
        port = Port(place.directory / "net0", MAC)
        launch = server.net([port], place.directory)
        if not launch.own_network:
            raise Unsupported(f"{server.name} wants no network namespace of its own")
        started = stack.enter_context(serving(server.name, launch, [port.socket], place))
        wire = Wire(started.pid)
        steps = stack.enter_context(Steps())
        guest, vmm = boot(steps, place, nics=[Nic(port.socket, MAC)])
        backend = Beside(started, vmm)
    wire.address_bridge()
    return steps, Link(guest, backend, wire, place)


@dataclass(frozen=True)
class Tcp:
    """iperf3 from the guest to the host, or back. An operation is a MiB."""

    link: Link
    reverse: bool = False

    async def run(self, seconds: float) -> Sample:
        link = self.link
        iperf3 = link.host_end(find_tool("iperf3"))
        async with iperf_server(HOST, link.place.directory, program=iperf3) as server:
            client = asyncio.create_task(
                iperf_client(link.guest, HOST, seconds=max(1, round(seconds)), reverse=self.reverse)
            )
            accepted = asyncio.create_task(server.line_with("Accepted connection"))
            ended = asyncio.create_task(server.wait())
            try:
                await asyncio.wait({client, accepted}, return_when=asyncio.FIRST_COMPLETED)
                used = link.backend.used()
                # It serves one test only, and ends with it.
                await asyncio.wait({client, ended}, return_when=asyncio.FIRST_COMPLETED)
                used = link.backend.used() - used
                result = await client
            finally:
                for task in (client, accepted, ended):
                    task.cancel()
                await asyncio.gather(client, accepted, ended, return_exceptions=True)
        operations = result.received_bytes // MIB
        if not operations:
            raise OSError(f"iperf3 received no more than {result.received_bytes} bytes")
        return Sample(
            operations=operations,
            seconds=result.seconds,
            metrics={
                "bits_per_second": result.bits_per_second,
                **_cpu_metrics(used, operations, result.seconds),
            },
            own_cpu_seconds=result.host_cpu_share * result.seconds,
        )


@dataclass(frozen=True)
class Ping:
    """Pings from the guest, one in flight. An operation is a ping."""

    link: Link

    async def run(self, seconds: float) -> Sample:
        count = max(1, round(seconds * 1000 / PING_INTERVAL_MS))
        used = self.link.backend.used()
        result = await ping_often(self.link.guest, HOST, count, interval_ms=PING_INTERVAL_MS)
        used = self.link.backend.used() - used
        if not result.received:
            raise TimeoutError(f"none of {count} pings was answered")
        times = sorted(result.times_us)
        return Sample(
            operations=result.received,
            seconds=seconds,
            metrics={
                "latency_mean_us": result.mean_us,
                "latency_p50_us": _percentile(times, 0.5),
                "latency_p99_us": _percentile(times, 0.99),
                "lost_share": 1 - result.received / result.sent,
                "server_cpu_us": used.server * 1e6 / result.received,
            },
            own_cpu_seconds=0,
            latency=Counter(round(time * 1000) for time in times),
        )


@dataclass(frozen=True)
class Stream:
    """Random bytes to the host and back, compared by their SHA-256. An operation is a MiB."""

    link: Link

    async def run(self, seconds: float) -> Sample:
        link = self.link
        size = max(1, round(seconds * STREAM_MIB_PER_SECOND)) * MIB
        await link.guest.run(f"head -c {size} /dev/urandom >/dev/shm/sent")
        program = [sys.executable, str(Path(__file__).with_name("echo.py")), HOST, str(size)]
        log = link.place.directory / "echo.log"
        async with running("echo", link.host_end(*program), log, pipe=True) as peer:
            _, port = (await peer.line_with("port ")).split()
            used = link.backend.used()
            await link.guest.run(
                f"bash -c 'exec 3<>/dev/tcp/{HOST}/{port}; cat /dev/shm/sent >&3;"
                " cat <&3 >/dev/shm/back'"
            )
            there = json.loads(await peer.line_with("sha256"))
            used = link.backend.used() - used
        sums = await link.guest.run("sha256sum </dev/shm/sent; sha256sum </dev/shm/back")
        sent, _, back, _ = sums.output.split()
        operations = 2 * size // MIB
        return Sample(
            operations=operations,
            seconds=there["seconds"],
            metrics={
                "bits_per_second": 2 * size * 8 / there["seconds"],
                **_cpu_metrics(used, operations, there["seconds"]),
            },
            own_cpu_seconds=0,
            corrupt=(there["sha256"] != sent) + (back != sent),
        )


def _cpu_metrics(used: Used, operations: int, seconds: float) -> dict[str, float]:
    return {
        "server_cpu_us": used.server * 1e6 / operations,
        "vmm_cpu_us": used.vmm * 1e6 / operations,
        "server_cpu_share": used.server / seconds,
        "vmm_cpu_share": used.vmm / seconds,
    }


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[round(fraction * (len(ordered) - 1))]
