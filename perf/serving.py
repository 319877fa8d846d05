"""A server from its launch to the answer on all its sockets, and to its end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from perf import hugepages
from perf.frontend.connection import time_to_features
from perf.model import Launch, Place, ServerFailed
from perf.process import Started
from perf.tools import find_tool
from vdev.errors import PeerError

START_SECONDS = 20.0
_ACCEPTS = 1 << 16  # of a socket's flags in /proc/net/unix: __SO_ACCEPTCON


@contextlib.contextmanager
def serving(
    name: str, launch: Launch, sockets: Sequence[Path], place: Place, *, pinned: bool = True
) -> Iterator[Started]:
    """Starts a server; it answers on all `sockets` when the context begins.

    Its log lies in the place's directory. Raises ServerFailed, ToolMissing or Unsupported.
    """
    log = place.directory / f"{name}.log"
    with hugepages.reserved(launch.hugepages):
        command = [word.replace("{cpu}", str(place.server_cpu)) for word in launch.command]
        with Started(
            name,
            command,
            log,
            cpu=place.server_cpu if pinned else None,
            environment=launch.environment,
            own_network=launch.own_network,
        ) as started:
            try:
                wait = _time_to_listening if launch.one_connection else time_to_features
                for socket in sockets:
                    wait(socket, started.started + START_SECONDS, started.end)
                for step in launch.after_start:
                    _in_network_of(started, step)
            except (OSError, PeerError, subprocess.CalledProcessError) as error:
                message = f"{name} did not start: {started.end() or error}"
                raise ServerFailed(message, started.log_tail()) from None
            yield started


def _time_to_listening(path: Path, deadline: float, ended: Callable[[], str | None]) -> float:
    """The same as time_to_features, but without a connection: when someone listens on `path`."""
    while time.monotonic() < deadline:
        if end := ended():
            raise ConnectionError(f"the server {end}")
        for line in Path("/proc/net/unix").read_text().splitlines():
            fields = line.split(maxsplit=7)  # Num RefCount Protocol Flags Type St Inode Path
            if fields[7:] == [str(path)] and int(fields[3], 16) & _ACCEPTS:
                return time.monotonic()
        time.sleep(0.0005)
    raise TimeoutError(f"nobody listens on {path}")


def _in_network_of(started: Started, command: Sequence[str]) -> None:
    subprocess.run(
        [find_tool("nsenter"), f"--net=/proc/{started.pid}/ns/net", *command],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory with a short path (sockets' paths have 107 bytes), removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="perf-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
