"""A server that is replaced by another process, again and again."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from vdev.runtime import runtime_dir
from vdev.server.control import request

from .server import Server
from .wire import TIMEOUT

_PR_SET_CHILD_SUBREAPER = 36


def reap_orphans() -> None:
    """Servers whose starter has left become children of this process, which sees how they end."""
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


class Replaced(Server):
    """`pid` is the process that serves now; it is the last one's child."""

    _pid: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self._pid is None else self._pid

    def upgrade(self, **arguments: Any) -> int:
        """Replaces it; returns its new process id.  Raises UserError where it goes on instead."""
        answer = request(self.control, "upgrade", patience=TIMEOUT, **arguments)
        self.follow(answer["pid"])
        return self.pid

    def follow(self, pid: int) -> None:
        """The last process has ended as it should, and this one serves."""
        last, self._pid = self.pid, pid
        if last == self.process.pid:
            assert self.process.wait(TIMEOUT) == 0
        else:
            assert os.waitpid(last, 0) == (last, 0)

    @property
    def control(self) -> Path:
        return runtime_dir() / f"{self.pid}.sock"

    def close(self) -> None:
        if self._pid is not None:
            self.terminate_last()
        super().close()

    def terminate_last(self) -> int:
        """SIGTERM to the process that serves now; returns its exit code."""
        pid, self._pid = self._pid, None
        if pid is None:
            return self.stop()
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Upgrading(threading.Thread):
    """`upgrade` as often as wanted, while the caller does something else."""

    def __init__(self, server: Replaced, times: int) -> None:
        super().__init__()
        self.server = server
        self.left = times
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while self.left:
                self.server.upgrade()
                self.left -= 1
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Returns when it is done, as it should be."""
        self.join()
        if self.error is not None:
            raise self.error


def failing(folder: Path, step: str, how: str) -> str:
    """A vdev that fails when it is about to say `step`: "die", "hang", "raise" or "mangle"; or
    that says nothing and goes on ("skip")."""
    path = folder / "failing-vdev"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys\n"
        "from vdev.errors import UserError\n"
        "from vdev.server.passage import Passage\n"
        "send = Passage.send\n"
        "async def bad(self, what, *rest):\n"
        f"    if what == {step!r}:\n"
        f"        if {how!r} == 'die': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"        if {how!r} == 'hang': os.kill(os.getpid(), signal.SIGSTOP)\n"
        f"        if {how!r} == 'raise': raise UserError('not in the mood')\n"
        f"        if {how!r} == 'mangle': what = 'something'\n"
        f"    if what != {step!r} or {how!r} != 'skip': await send(self, what, *rest)\n"
        "Passage.send = bad\n"
        "from vdev.cli import main\n"
        "sys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)
