"""A server program under test: a real process, its readiness, its fds, mappings and end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .session import Session
from .wire import TIMEOUT


class ServerDied(AssertionError):
    """The process under test is gone."""


class Server:
    """`argv` as a process, started and ready: it has said READY=1 to NOTIFY_SOCKET."""

    def __init__(
        self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = [os.fspath(arg) for arg in argv]
        self._notify_dir = tempfile.TemporaryDirectory(prefix="vdev-test-")
        path = os.path.join(self._notify_dir.name, "notify")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.notify.bind(path)
        self.stderr_path = Path(self._notify_dir.name, "stderr")
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.argv,
                env={**os.environ, **(env or {}), "NOTIFY_SOCKET": path},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    @classmethod
    def vdev(cls, *args: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Self:
        return cls([sys.executable, "-m", "vdev", *args], env=env)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def _wait_ready(self) -> None:
        pidfd = os.pidfd_open(self.pid)
        try:
            deadline = time.monotonic() + TIMEOUT
            while True:
                left = max(0.0, deadline - time.monotonic())
                readable, _, _ = select.select([self.notify.fileno(), pidfd], [], [], left)
                if self.notify.fileno() in readable:
                    if b"READY=1" in self.notify.recv(4096).split(b"\n"):
                        return
                elif pidfd in readable:
                    raise ServerDied(f"{self.argv}: ended before it was ready\n{self.output}")
                else:
                    raise AssertionError(f"{self.argv}: not ready in {TIMEOUT} s\n{self.output}")
        finally:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process if it still runs, by SIGTERM and then by SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.notify.close()
        self._notify_dir.cleanup()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)

    # ---- what the process holds, or the worker of `vdev serve` ----

    @property
    def worker_pid(self) -> int:
        """Who serves: the only child, or the process itself."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert len(children) <= 1
        return int(children[0]) if children else self.pid

    def check_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            raise ServerDied(f"the server ended with {code}\n{self.output}")

    def fds(self) -> Counter[str]:
        """What the open fds refer to; numbers of sockets and pipes left out."""
        found: Counter[str] = Counter()
        directory = f"/proc/{self.worker_pid}/fd"
        for name in os.listdir(directory):
            try:
                target = os.readlink(f"{directory}/{name}")
            except FileNotFoundError:
                continue
            found[target.split("[")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
        return found

    def shared_maps(self) -> Counter[str]:
        """The shared mappings, guest memory among them, by what they map."""
        found: Counter[str] = Counter()
        for line in Path(f"/proc/{self.worker_pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if fields[1].endswith("s"):
                found[fields[5] if len(fields) > 5 else "anonymous"] += 1
        return found

    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(Path(f"/proc/{self.worker_pid}/statm").read_text().split()[1]) * 4096

    def holdings(self, socket_path: str | os.PathLike[str]) -> tuple[Counter[str], Counter[str]]:
        """Fds and shared mappings while one new client is connected and has been answered.

        The answer orders the count after what the server did for clients that left before.
        """
        with Session(socket_path) as probe:
            probe.get_features()
            return self.fds(), self.shared_maps()

    def check_holdings(
        self,
        socket_path: str | os.PathLike[str],
        baseline: tuple[Counter[str], Counter[str]],
    ) -> None:
        """The process holds what it held at `baseline`; it has until TIMEOUT to tidy up."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            now = self.holdings(socket_path)
            if now == baseline:
                return
            if time.monotonic() > deadline:
                more = [n - b for n, b in zip(now, baseline, strict=True)]
                less = [b - n for n, b in zip(now, baseline, strict=True)]
                raise AssertionError(f"fds, mappings: left over {more}, missing {less}")
