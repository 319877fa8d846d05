"""Programs under test: started on a core, measured from outside, surely ended.

Each gets a session of its own, so that Ctrl-C reaches only us and we end it in order, and a death
signal (``setpriv --pdeathsig``), so that it does not outlive us when we cannot.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from perf.tools import find_tool
from vdev.closing import Closing

GRACE_SECONDS = 10.0
_LOG_LINES = 20


class Started(Closing):
    """A running program; a context manager that ends it. Raises ToolMissing or OSError."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        cpu: int | None = None,
        environment: Mapping[str, str] | None = None,
        own_network: bool = False,
        talks: bool = False,
    ) -> None:
        """`cpu`: the core that it may run on. `own_network`: in a network namespace of its own.

        With `talks` its stdin and stdout are pipes, and only stderr is logged.
        """
        self.name = name
        self.log = log
        wrapped = [find_tool("setpriv"), "--pdeathsig=TERM"]
        if own_network:
            wrapped += [find_tool("unshare"), "--net", "--"]
        if cpu is not None:
            wrapped += [find_tool("taskset"), "-c", str(cpu)]
        self.started = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*wrapped, *command],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """CPU time of all its threads, and its children's, so far; also of threads that ended.

        This is utime + stime of /proc/PID/stat before it is rounded to ticks: the process's CPU
        clock (clock_getcpuclockid(3): the complement of the id, shifted, scheduler's clock).
        Raises OSError when it has ended.
        """
        if self.process.poll() is not None:
            raise ProcessLookupError(f"{self.name} {self.end()}")
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._family())

    def memory_mib(self) -> float:
        """The proportional set sizes of it and its children in MiB: shared pages count by the
        number of their users."""
        lines = [
            line
            for pid in self._family()
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        ]
        if not lines:
            raise OSError(f"the kernel tells no Pss of {self.name}")
        return sum(int(line.split()[1]) for line in lines) / 1024

    def _family(self) -> list[int]:
        """Its process and its children."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [self.pid, *map(int, text.split())]

    def end(self) -> str | None:
        """How it ended, or None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    def log_tail(self) -> list[str]:
        """The last lines that it wrote."""
        with contextlib.suppress(FileNotFoundError):
            text = self.log.read_bytes().decode(errors="replace")
            return text.rstrip().splitlines()[-_LOG_LINES:]
        return []

    def rest(self) -> None:
        """Stops it where it is, so that it does not disturb while others are measured."""
        self._signal_family(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal_family(signal.SIGCONT)

    def _signal_family(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            for pid in self._family():
                os.kill(pid, number)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Ends it by SIGTERM, or by SIGKILL when that takes too long."""
        self._signal(signal.SIGTERM)
        self._signal_family(signal.SIGCONT)
        try:
            self.process.wait(GRACE_SECONDS)
        except BaseException as error:
            self._signal(signal.SIGKILL)
            self.process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
