"""Start: from exec to the first answer, memory, and CPU while idle."""

from __future__ import annotations

from perf.loads.start import Start
from perf.model import Suite, Workload

SERVERS = ("vdev", "qsd", "spdk", "ch-block")
COMPARED = ("start_ms", "memory_mib")

SUITE = Suite(
    "start",
    "Start, no guest",
    [
        Workload(
            "start-null", Start("null"), SERVERS, "Start with a null disk", COMPARED, seconds=0.3
        ),
        Workload(
            "start-file",
            Start("tmpfs", verify=True),
            SERVERS,
            "Start with a file on tmpfs, then written and checked",
            COMPARED,
            seconds=0.3,
            verified=True,
            gate=True,
        ),
    ],
)
