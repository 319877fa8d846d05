"""Processes, on either event loop: uvloop's own leave descriptors in the child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Self

from vdev.errors import UserError


class Child:
    """A process that this one has started, or did before an exec.

    Until it is reaped, nobody else gets its process id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._ended: asyncio.Task[None] = asyncio.ensure_future(self._wait())

    @classmethod
    def start(
        cls, command: Sequence[str], fds: Sequence[int], env: Mapping[str, str] | None = None
    ) -> Self:
        """Runs `command`; it has our standard streams, and `fds` by the same numbers.

        Raises UserError where there is no such program.
        """
        try:
            process = subprocess.Popen(command, pass_fds=fds, env=env)
        except OSError as error:
            raise UserError(f"program {command[0]}: {error.strerror}") from None
        process.returncode = 0  # so that Popen leaves the reaping to us
        return cls(process.pid)

    async def ended(self) -> None:
        """Returns when it has ended, and need not be reaped yet."""
        await asyncio.shield(self._ended)

    def reap(self) -> int:
        """The exit code of one that has ended, or its signal as a negative number."""
        if self._code is None:
            try:
                _, status = os.waitpid(self.pid, 0)
            except ChildProcessError:
                status = 0  # whoever started us has SIGCHLD ignored, so nobody knows
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    async def wait(self) -> int:
        """As `reap`, when it has ended."""
        await self.ended()
        return self.reap()

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._signal(signal.SIGKILL)

    def watch(self) -> int:
        """A descriptor of it, for `end_process`; the caller's. Raises OSError."""
        return os.pidfd_open(self.pid)

    def _signal(self, number: signal.Signals) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _wait(self) -> None:
        pidfd = self.watch()
        try:
            await _ended(pidfd)
        finally:
            os.close(pidfd)


async def end_process(pidfd: int) -> None:
    """SIGKILL to a process, which need not be ours; returns when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await _ended(pidfd)


async def _ended(pidfd: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        with contextlib.suppress(OSError):
            loop.remove_reader(pidfd)
