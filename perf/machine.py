"""The facts about the machine that a result is worth nothing without."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from perf import noise
from perf.host import Host
from perf.tools import first_line

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("qemu-system-x86_64", "qemu-storage-daemon", "fio", "iperf3")


def _read(path: str, missing: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return missing


def _hypervisor() -> str:
    words = _read("/proc/cpuinfo", "").split()
    return "a virtual machine" if "hypervisor" in words else "bare metal, or not told"


def _memory() -> str:
    total = next(
        (
            int(line.split()[1])
            for line in _read("/proc/meminfo", "").splitlines()
            if line.startswith("MemTotal:")
        ),
        0,
    )
    return f"{total / (1 << 20):.1f} GiB"


def facts(cpus: tuple[int, int], kind: Host) -> dict[str, str]:
    """By name: CPU, kernel, governor, versions, distance of the two CPUs that are used."""
    governor = _read(
        f"/sys/devices/system/cpu/cpu{cpus[1]}/cpufreq/scaling_governor", "not shown here"
    )
    distance = noise.measure(*cpus)
    found = {
        "CPU": f"{kind.cpu}, {os.cpu_count()} of them",
        "machine": _hypervisor(),
        "memory": _memory(),
        "kernel": f"{platform.system()} {kind.kernel}",
        "a system call": f"{kind.system_call_ns:.0f} ns, of a 4 KiB read {kind.read_ns:.0f} ns",
        "governor": governor,
        "client and server on": f"CPU {cpus[0]} and CPU {cpus[1]}",
        "cache line there and back": f"{distance.round_trip_ns:.0f} ns ({distance.placement})",
        "load average": " ".join(_read("/proc/loadavg", "").split()[:3]),
        "Python": platform.python_version(),
    }
    return found | {name: version for name in TOOLS if (version := first_line([name], "--version"))}


def commit() -> str:
    """The checkout's commit, with "+" where files are changed, or "unknown"."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
