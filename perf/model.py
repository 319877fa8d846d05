"""The nouns: a suite is workloads times servers; a load drives a server and yields samples.

    Suite       a named list of workloads (perf/suites/, one file a suite, data only)
    Workload    a load, the servers that it is put on, and the metrics by which they are compared
    Load        how to attach a client to a server (perf/loads/)
    Server      how a server is started (perf/servers/, one file a server)
    Target      a running server with its client attached, at rest but while it is measured
    Sample      what one window on a target came to

Neither loads nor servers know about rounds and statistics; those are perf/run.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from perf.errors import PerfError


@dataclass(frozen=True)
class Metric:
    """What a number means: its unit, and which direction is good."""

    title: str
    unit: str
    better: Literal["higher", "lower"]


METRICS: Mapping[str, Metric] = {
    "iops": Metric("requests a second", "1/s", "higher"),
    "bytes_per_second": Metric("bytes a second", "B/s", "higher"),
    "packets_per_second": Metric("packets a second", "1/s", "higher"),
    "bits_per_second": Metric("bits a second", "bit/s", "higher"),
    "latency_mean_us": Metric("mean latency", "µs", "lower"),
    "latency_p50_us": Metric("median latency", "µs", "lower"),
    "latency_p99_us": Metric("99th percentile of latency", "µs", "lower"),
    "latency_p999_us": Metric("99.9th percentile of latency", "µs", "lower"),
    "server_cpu_us": Metric("server CPU time an operation", "µs", "lower"),
    "client_cpu_us": Metric("client CPU time an operation", "µs", "lower"),
    "vmm_cpu_us": Metric("VMM CPU time an operation", "µs", "lower"),
    "server_cpu_share": Metric("server CPU", "cores", "lower"),
    "vmm_cpu_share": Metric("VMM CPU", "cores", "lower"),
    "lost_share": Metric("packets lost", "share", "lower"),
    "start_ms": Metric("exec to first answer", "ms", "lower"),
    "memory_mib": Metric("memory (proportional set)", "MiB", "lower"),
    "idle_cpu_share": Metric("CPU when idle", "cores", "lower"),
}


class Unsupported(PerfError):
    """This server or this host cannot do what the workload asks; the message says what."""


class ServerFailed(Exception):
    """The server did not start; the message says how it ended, `log` holds its last lines."""

    def __init__(self, message: str, log: Sequence[str]) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Disk:
    """A disk to serve: a file, or without one a null image; at the socket's path."""

    socket: Path
    size: int
    file: Path | None = None
    direct: bool = False
    queues: int = 1


@dataclass(frozen=True)
class Port:
    """A network card to serve at the socket's path; all ports of a server reach each other.

    `segmented`: frames larger than the MTU cross it, to be cut by the receiver (TSO).
    """

    socket: Path
    mac: str
    pairs: int = 1
    mtu: int = 1500
    segmented: bool = False


@dataclass(frozen=True)
class Launch:
    """How to start a server. `own_network`: in a network namespace that ends with it.

    ``{cpu}`` in the command stands for the core that the server is to run on.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    own_network: bool = False
    hugepages: int = 0
    """2 MiB pages that it needs reserved while it runs."""
    after_start: Sequence[Sequence[str]] = ()
    """Commands to run in its network namespace once it answers."""
    one_connection: bool = False
    """It serves the first that connects, and ends with that connection: nobody may try it out."""


class Server:
    """A server that can be started; subclasses override what it can serve."""

    name: str

    def with_command(self, name: str, command: Sequence[str]) -> Server:
        """The same server by another name, started by another command."""
        raise Unsupported(f"{self.name} is not started by one command")

    def version(self) -> str:
        """What it says of its version, or an empty string."""
        return ""

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        """Serves disks; may write files into `directory`. Raises Unsupported or ToolMissing."""
        raise Unsupported(f"{self.name} serves no disks without a guest")

    def net(self, ports: Sequence[Port], directory: Path) -> Launch:
        """Serves network cards that reach each other. Raises Unsupported or ToolMissing."""
        raise Unsupported(f"{self.name} serves no network cards without a guest")


@dataclass(frozen=True)
class Sample:
    """What one window came to; `latency`: ns (floor) and a count.

    `own_cpu_seconds`: what server, VMM and client programs used from the beginning of `measure`
    to its end, warm-up included, to tell others' use of the cores from it.
    """

    operations: int
    seconds: float
    metrics: Mapping[str, float]
    own_cpu_seconds: float
    errors: int = 0
    corrupt: int = 0
    latency: Mapping[int, int] = field(default_factory=dict)


class Target(Protocol):
    """A running server with its client attached. It rests until `go_on` and after `rest`."""

    def go_on(self) -> None: ...

    def rest(self) -> None: ...

    def measure(self, seconds: float) -> Sample:
        """Runs one window; warms up first.

        Raises TimeoutError when the server stopped answering, OSError when it is gone or broke
        the ring.
        """
        ...

    def alive(self) -> str | None:
        """None while the server runs, else how it ended."""
        ...

    def log_tail(self) -> Sequence[str]:
        """The last lines that the server wrote."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a measurement happens: cores for client and server, a directory of its own."""

    client_cpu: int
    server_cpu: int
    directory: Path


class Load(Protocol):
    """How a workload is driven."""

    def attach(self, server: Server, place: Place) -> AbstractContextManager[Target]:
        """Starts the server and attaches the client; both end with the context.

        Raises Unsupported, ToolMissing, ServerFailed or OSError.
        """
        ...


@dataclass(frozen=True)
class Workload:
    """A load on some servers. The first server is the one that the others are compared with.

    Rows of one `series` are one plot, over `x` (a name and a value) where there are several.
    """

    name: str
    load: Load
    servers: Sequence[str]
    series: str
    compared: Sequence[str]
    x: tuple[str, float] | None = None
    seconds: float = 1.0
    verified: bool = False
    gate: bool = False
    """Part of the short set of `make perf-gate`."""


@dataclass(frozen=True)
class Suite:
    """A named list of workloads.

    `calm_share`: of a core that others may use in a window that counts.
    """

    name: str
    title: str
    workloads: Sequence[Workload]
    calm_share: float = 0.1
