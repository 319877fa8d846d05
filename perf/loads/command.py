"""Clients that are programs: run to their end on the client's core, their CPU time with them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from perf.tools import find_tool

SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class Finished:
    """A program's output and the CPU time of it and its children, in seconds."""

    code: int
    output: str
    cpu_seconds: float
    seconds: float


def run(
    command: Sequence[str],
    *,
    cpu: int,
    environment: Mapping[str, str] | None = None,
    seconds: float,
) -> Finished:
    """Runs a client that should take about `seconds`; stdout and stderr come together.

    Raises TimeoutError when it takes much longer.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [find_tool("setpriv"), "--pdeathsig=KILL", find_tool("taskset"), "-c", str(cpu), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    before = _children_cpu()
    try:
        output, _ = process.communicate(timeout=seconds + SLACK_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{command[0]} did not end in {error.timeout:.0f} s") from None
        raise
    took = time.monotonic() - started
    return Finished(process.returncode, output, _children_cpu() - before, took)


def _children_cpu() -> float:
    """Of all children that were waited for; there is only one at a time here."""
    times = os.times()
    return times.children_user + times.children_system
