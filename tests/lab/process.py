"""Programs of the host: run to their end, or kept running and surely ended.

A started program gets a session of its own, so that Ctrl-C reaches only us and we end it in
order, and a death signal (``setpriv --pdeathsig``), so that it does not outlive us when we are
killed and cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class ProcessError(Exception):
    """A program failed or ended too early; the message holds the end of what it wrote."""


def tail(path: Path, lines: int = 60) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.replace("\r", "").rstrip().split("\n")[-lines:])


async def run(
    *argv: str | Path, env: Mapping[str, str] | None = None, stdin: bytes | None = None
) -> bytes:
    """Run a program to its end and return what it wrote to stdout."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=None if env is None else {**os.environ, **env},
        start_new_session=True,
    )
    try:
        out, err = await process.communicate(stdin)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if process.returncode:
        said = (err or out).decode(errors="replace").strip()[-3000:]
        raise ProcessError(f"{' '.join(map(str, argv))}: exit code {process.returncode}\n{said}")
    return out


class Process:
    """A program that keeps running, its output in a log file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for its end."""
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def line_with(self, text: str) -> str:
        """Read stdout up to the next line that holds this text."""
        assert self._process.stdout, "started without a pipe"
        while line := (await self._process.stdout.readline()).decode(errors="replace"):
            if text in line:
                return line
        raise ProcessError(f"{self.name} never wrote {text!r}; its log:\n{tail(self.log)}")

    async def stop(self, grace: float = 15) -> int:
        """End it by SIGTERM, or by SIGKILL when it has not ended within the grace period."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except BaseException:
            self.signal(signal.SIGKILL)
            await self.wait()
            raise

    async def kill(self) -> None:
        """End it by SIGKILL."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def ended(self, doing: str) -> ProcessError:
        """The error to raise when it has ended while something else was expected of it."""
        return ProcessError(
            f"{self.name} ended (exit code {self.returncode}) {doing}; the end of {self.log}:\n"
            f"{tail(self.log)}"
        )


@contextlib.asynccontextmanager
async def running(
    name: str,
    argv: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    pipe: bool = False,
    death_signal: signal.Signals = signal.SIGKILL,
) -> AsyncIterator[Process]:
    """Keep a program running for the length of the block; killed at its end if still there.

    With ``pipe`` its stdout is not logged but read line by line, by ``line_with``.
    """
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            "setpriv",
            f"--pdeathsig={death_signal.name.removeprefix('SIG')}",
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if pipe else output,
            stderr=output,
            env=None if env is None else {**os.environ, **env},
            pass_fds=pass_fds,
            start_new_session=True,
        )
    started = Process(name, process, log)
    try:
        yield started
    finally:
        if started.returncode is None:
            await started.kill()


async def while_running(process: Process, wanted: Awaitable[T], doing: str) -> T:
    """Await something that needs the process; the end of the process before that is an error."""
    task = asyncio.ensure_future(wanted)
    end = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise process.ended(doing)
    finally:
        task.cancel()
        end.cancel()
        await asyncio.gather(task, end, return_exceptions=True)
