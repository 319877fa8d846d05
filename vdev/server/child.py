"""Processes, on either event loop: uvloop's own leave descriptors in the child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from vdev.errors import UserError


class Child:
    """Runs `command`; it has our standard streams, and `fds` by the same numbers."""

    def __init__(
        self, command: Sequence[str], fds: Sequence[int], env: Mapping[str, str] | None = None
    ) -> None:
        """Raises UserError where there is no such program."""
        try:
            self._process = subprocess.Popen(command, pass_fds=fds, env=env)
        except OSError as error:
            raise UserError(f"program {command[0]}: {error.strerror}") from None
        self._ended: asyncio.Task[int] = asyncio.ensure_future(self._wait())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit code, or its signal as a negative number, when it has ended."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()

    def watch(self) -> int:
        """A descriptor of it, for `end_process`; the caller's. Raises OSError."""
        return os.pidfd_open(self._process.pid)

    async def _wait(self) -> int:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await _ended(pidfd)
        finally:
            os.close(pidfd)
        return self._process.wait()


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
