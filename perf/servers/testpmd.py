"""DPDK's testpmd with net_vhost ports, forwarding from one to the other. It always polls.

``testpmd`` passes frames from one vhost port to the other, untouched. ``testpmd-tap`` passes them
to taps on a kernel bridge, which is the way that vdev's bridged cards take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.model import Launch, Port, Unsupported
from perf.program import Program
from perf.tools import said

PROGRAM = "dpdk-testpmd"
MEMORY_MIB = 256
BRIDGE = "perf0"
_PORTS = 2


@dataclass
class Testpmd(Program):
    """`taps`: through taps and a bridge instead of directly."""

    program = PROGRAM
    taps: bool = False

    def version(self) -> str:
        """DPDK tells its version only at the start of its help."""
        told = said(self.command or [PROGRAM], "-v", "--help")
        found = re.search(r"RTE Version: '(.*)'", told)
        return found[1] if found else ""

    def net(self, ports: Sequence[Port], directory: Path) -> Launch:
        if len(ports) != _PORTS:
            raise Unsupported(f"{self.name} forwards between {_PORTS} ports")
        if any(port.segmented for port in ports):
            raise Unsupported(f"{self.name} passes on no segments larger than its buffers")
        command = [*self.start(), *eal("perf-server", "{cpu}")]
        after: list[list[str]] = []
        for number, port in enumerate(ports):
            command += ["--vdev", f"net_vhost{number},iface={port.socket},queues={port.pairs}"]
            if self.taps:
                # Devices are probed in the order of their names' ends: vhost, tap, vhost, tap.
                command += ["--vdev", f"net_tap{number},iface=perftap{number}"]
                after.append(["ip", "link", "set", f"perftap{number}", "master", BRIDGE, "up"])
        if self.taps:
            after.insert(0, ["ip", "link", "add", BRIDGE, "up", "type", "bridge"])
        # With a period of statistics it runs until it is told to end, not until its input ends.
        command += ["--", "--nb-cores=1", "--forward-mode=io", "--auto-start"]
        command += ["--total-num-mbufs=16384", "--stats-period=3600"]
        return Launch(command, own_network=True, hugepages=MEMORY_MIB // 2, after_start=after)


def eal(prefix: str, cpu: str) -> list[str]:
    """Options of DPDK itself: one core for its two threads, memory that nobody else sees."""
    return [
        *("--lcores", f"0@{cpu},1@{cpu}", "--no-pci", "--in-memory", "--no-telemetry"),
        *("--file-prefix", prefix, "-m", str(MEMORY_MIB)),
    ]


SERVERS = [Testpmd("testpmd"), Testpmd("testpmd-tap", taps=True)]
