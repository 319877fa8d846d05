"""Network load by DPDK's testpmd with net_virtio_user ports: frames that go round and round.

It sends a burst of frames on each port at first, and from then on sends on the other port what
arrives at one: a fixed number of frames in flight, which the server passes on in both directions.
Each window starts with a fresh burst, so what a server has lost is missed in one window only.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf import hugepages
from perf.loads.net import served_ports
from perf.loads.target import WARM_UP_SECONDS, ServerTarget
from perf.model import Place, Port, Sample, Server, Target
from perf.process import Started
from perf.servers.testpmd import MEMORY_MIB, PROGRAM, eal
from perf.tools import find_tool

BURSTS = 8  # of 32 frames, on each port
PROMPT = b"testpmd> "
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class TestpmdNet:
    """Frames of `size` bytes through a server with two ports, in both directions at once."""

    size: int

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        find_tool(PROGRAM)
        with (
            served_ports(server, place, segmented=False) as (started, ports),
            hugepages.reserved(MEMORY_MIB // 2),
            _Client(ports, place) as client,
        ):
            client.ask(f"set txpkts {self.size}")
            yield _TestpmdTarget(started, client, self.size, place)


class _Client(Started):
    """A testpmd that takes commands."""

    def __init__(self, ports: Sequence[Port], place: Place) -> None:
        # Its prompts are written at once, but what it prints would wait in stdio's buffer.
        command = [find_tool("stdbuf"), "-oL", find_tool(PROGRAM)]
        command += eal("perf-client", str(place.client_cpu))
        command += ["--single-file-segments"]
        for number, port in enumerate(ports):
            settings = f"path={port.socket},queues=1,queue_size=1024,mrg_rxbuf=1,mac={port.mac}"
            command += ["--vdev", f"net_virtio_user{number},{settings}"]
        command += ["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", "--no-lsc-interrupt"]
        super().__init__(
            "testpmd client",
            command,
            place.directory / "testpmd-client.log",
            cpu=place.client_cpu,
            talks=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> str:
        """What it writes up to its next prompt.

        Raises TimeoutError when none comes, ConnectionError when it has ended.
        """
        assert self.process.stdout
        said = b""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not said.endswith(PROMPT):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{self.name} did not answer for {PATIENCE_SECONDS:.0f} s")
                part = os.read(self.process.stdout.fileno(), 65536)
                if not part:
                    raise ConnectionError(f"{self.name} {self.process.wait()}")
                said += part
        return said.decode(errors="replace")

    def ask(self, command: str) -> str:
        """Gives a command and returns its answer."""
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        return self._answer()

    def received(self) -> int:
        """The frames that have arrived on both ports so far."""
        counts = re.findall(r"RX-packets: (\d+)", self.ask("show port stats all"))
        return sum(map(int, counts))


class _TestpmdTarget(ServerTarget):
    """A server, and a testpmd that stays connected to it."""

    def __init__(self, server: Started, client: _Client, size: int, place: Place) -> None:
        super().__init__(server, place)
        self._client = client
        self._size = size

    def go_on(self) -> None:
        super().go_on()
        self._client.go_on()

    def rest(self) -> None:
        self._client.rest()
        super().rest()

    def measure(self, seconds: float) -> Sample:
        server, client = self._server, self._client
        began = server.cpu_seconds() + client.cpu_seconds()
        client.ask(f"start tx_first {BURSTS}")
        time.sleep(WARM_UP_SECONDS)
        first, start, clock = client.received(), server.cpu_seconds(), time.monotonic()
        mine = client.cpu_seconds()
        time.sleep(seconds)
        last, end, clock = client.received(), server.cpu_seconds(), time.monotonic() - clock
        mine = client.cpu_seconds() - mine
        client.ask("stop")
        packets = last - first
        if not packets:
            raise OSError("no frames arrived")
        return Sample(
            operations=packets,
            seconds=clock,
            metrics={
                "packets_per_second": packets / clock,
                "bits_per_second": packets * self._size * 8 / clock,
                "server_cpu_us": (end - start) * 1e6 / packets,
                "client_cpu_us": mine * 1e6 / packets,
            },
            own_cpu_seconds=server.cpu_seconds() + client.cpu_seconds() - began,
        )
