"""What disturbs a measurement: how far apart the two cores are, and who else uses them.

Virtual cores move over the host's. The same two are sometimes "near" (they share a cache) and
sometimes "far", and far costs up to three times in round trips. A measurement is worth as much as
the record of which it was.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vdev._native import ffi, lib

ROUNDS = 20  # of 1000 bounces each: 2-10 ms
FAR_NS = 250.0  # between what was seen near (45-135 ns) and far (390-440 ns)


@dataclass(frozen=True)
class Distance:
    """The time of a cache line from one core to the other and back, in nanoseconds."""

    round_trip_ns: float

    @property
    def placement(self) -> str:
        return "far" if self.round_trip_ns > FAR_NS else "near"


def measure(cpu_a: int, cpu_b: int) -> Distance:
    """The present distance of two CPUs. Raises OSError where there are no two."""
    result = ffi.new("double *")
    error = lib.vhost_driver_ping(cpu_a, cpu_b, ROUNDS, result)
    if error == -errno.EINVAL:
        raise OSError(errno.EINVAL, f"CPUs {cpu_a} and {cpu_b} are not both there")
    if error:
        raise OSError(-error, os.strerror(-error))
    return Distance(result[0])


def busy_seconds(*cpus: int) -> float:
    """How long CPUs have been busy since the machine started, together, in ticks of 10 ms.

    Raises OSError where there is no such CPU (proc(5), /proc/stat).
    """
    busy = {}
    with open("/proc/stat") as file:
        for line in file:
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu":
                user, nice, system, _idle, _iowait, irq, softirq = map(int, ticks[:7])
                busy[name] = user + nice + system + irq + softirq
    try:
        total = sum(busy[f"cpu{cpu}"] for cpu in cpus)
    except KeyError as missing:
        raise OSError(errno.EINVAL, f"there is no {missing.args[0]}") from None
    return float(total) / os.sysconf("SC_CLK_TCK")
