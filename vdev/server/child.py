"""A process of ours, on either event loop: uvloop's own leave descriptors in the child."""

from __future__ import annotations

import asyncio
import contextlib
import os
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

    async def _wait(self) -> int:
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self._process.pid)
        try:
            ended = asyncio.Event()
            loop.add_reader(pidfd, ended.set)
            await ended.wait()
        finally:
            with contextlib.suppress(OSError):
                loop.remove_reader(pidfd)
            os.close(pidfd)
        return self._process.wait()
