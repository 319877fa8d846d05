"""A shared folder's back-end: virtiofsd, a process of its own, which ends with its connection.

It is waited for without a thread and without a child watcher: the process may be confined while
virtiofsd runs, and by then it cannot signal anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator

from vdev._native import lib
from vdev.errors import UserError
from vdev.vmm.config import ShareConfig

# Debian 12 has it with QEMU, later ones as a package of its own; neither is on the PATH.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_LAST_WORDS = 2048
_PATIENCE = 10.0
"""Seconds that it has to end once its connection is closed."""


class Virtiofsd:
    """Serves `share` to one front-end."""

    def __init__(self, share: ShareConfig) -> None:
        self._share = share
        self._process: subprocess.Popen[bytes] | None = None
        self._end = -1

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Starts it; the socket is there to be connected to for the length of the block.

        Raises UserError where virtiofsd is missing, or ends; `close` is due in any case.
        """
        program, folder = find(), _folder_of(self._share)
        with tempfile.TemporaryDirectory(prefix="vdev-share-") as place:
            socket = f"{place}/socket"
            # Not asyncio's: its watcher may be a thread.
            self._process = process = subprocess.Popen(  # noqa: ASYNC220
                [
                    program,
                    f"--socket-path={socket}",
                    *(
                        ("-o", f"source={folder}")
                        if "qemu" in program
                        else ("--shared-dir", folder)
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._end = os.pidfd_open(process.pid)
            await self._started(process, socket)
            yield socket
        assert process.stderr is not None
        words = process.stderr.fileno()
        os.set_blocking(words, False)
        asyncio.get_running_loop().add_reader(words, _drop, words)

    async def close(self) -> None:
        """Returns once it has ended; its connection is closed by now."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stderr is not None
        asyncio.get_running_loop().remove_reader(process.stderr.fileno())
        if process.poll() is None:
            if not lib.sandbox_is_sealed():
                with contextlib.suppress(PermissionError):
                    process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_readable(self._end), _PATIENCE)
            process.poll()
        os.close(self._end)
        process.stderr.close()

    async def _started(self, process: subprocess.Popen[bytes], socket: str) -> None:
        assert process.stderr is not None
        while not _exists(socket):
            if process.poll() is not None:
                words = process.stderr.read(_LAST_WORDS).decode(errors="replace").strip()
                raise UserError(
                    f"share {self._share.id}: virtiofsd ended: {words or process.returncode}"
                )
            await asyncio.sleep(0.005)


def find() -> str:
    """Where virtiofsd is. Raises UserError."""
    for place in (shutil.which("virtiofsd"), *_PLACES):
        if place and os.access(place, os.X_OK):
            return place
    raise UserError(
        "a shared folder needs virtiofsd (Debian 12: qemu-system-common, later: virtiofsd)"
    )


def _folder_of(share: ShareConfig) -> str:
    if not os.path.isdir(share.directory):
        raise UserError(f"share {share.id}: {share.directory} is no folder")
    return os.path.abspath(share.directory)


def _exists(path: str) -> bool:
    return os.path.exists(path)


def _drop(fd: int) -> None:
    """Its warnings go nowhere, but a full pipe would hold it up."""
    with contextlib.suppress(BlockingIOError):
        if not os.read(fd, 1 << 16):
            asyncio.get_running_loop().remove_reader(fd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
