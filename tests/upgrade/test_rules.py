"""Who serves when a successor fails, with servers that only note what is asked of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest

from vdev.errors import UserError
from vdev.server.child import end_process
from vdev.server.device_server import DeviceServer
from vdev.server.handover import hand_over
from vdev.server.passage import Passage


class Noted:
    """What `hand_over` asks of a server, and whether the successor was alive then."""

    def __init__(self, successor: subprocess.Popen[bytes]) -> None:
        self._successor = successor
        self.alive: dict[str, bool] = {}

    def _note(self, what: str) -> None:
        self.alive[what] = self._successor.poll() is None

    def stand(self, _fds: object) -> dict[str, Any]:
        return {}

    def save(self, _fds: object) -> dict[str, Any]:
        return {}

    async def pause(self) -> None:
        self._note("pause")

    async def halt(self) -> list[object]:
        self._note("halt")
        return []

    async def resume(self) -> None:
        self._note("resume")


@contextmanager
def successor() -> Iterator[tuple[Noted, int]]:
    """A process that does nothing by itself, and its pidfd."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Noted(process), pidfd
        finally:
            process.kill()
            os.close(pidfd)


async def say(passage: Passage, last: str) -> None:
    """The successor's part, as a hand-over goes, up to and with `last`."""
    for came, answer in (("stands", "ready"), ("sessions", "prepared"), ("rings", "serving")):
        _, fds = await passage.receive(came)
        fds.close()
        await passage.send(answer if answer != last else "something")
        if answer == last:
            return


@pytest.mark.parametrize(
    ("last", "asked"),
    [
        ("ready", {"resume": False}),
        ("prepared", {"pause": True, "resume": False}),
        ("serving", {"pause": True, "halt": True, "resume": False}),
    ],
)
async def test_it_has_ended_before_the_old_one_goes_on(last: str, asked: dict[str, bool]) -> None:
    with successor() as (server, pidfd):
        ours, theirs = map(Passage, Passage.pair())
        saying = asyncio.ensure_future(say(theirs, last))
        with pytest.raises(UserError, match="this server goes on"):
            await hand_over(
                ours,
                [cast(DeviceServer, server)],
                lambda _fds: None,
                partial(end_process, pidfd),
                patience=30.0,
            )
        await saying
        ours.close()
        theirs.close()
        assert server.alive == asked


async def test_one_that_is_no_process_stops_nobody() -> None:
    with successor() as (server, _):
        ours, theirs = map(Passage, Passage.pair())
        theirs.close()
        input_fd = os.dup(0)
        with pytest.raises(UserError, match="this server goes on"):
            await hand_over(
                ours,
                [cast(DeviceServer, server)],
                lambda _fds: None,
                partial(end_process, input_fd),
                patience=30.0,
            )
        ours.close()
        os.close(input_fd)
        assert server.alive == {"resume": True}
