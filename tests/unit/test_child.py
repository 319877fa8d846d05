"""Processes that are started, or were before an exec, and how they ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from vdev.errors import UserError
from vdev.server.child import Child


def ending(how: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal\n{how}"]


def spawn(how: str) -> int:
    return os.posix_spawn(sys.executable, ending(how), os.environ)


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_how_it_ended_waits_until_somebody_wants_to_know() -> None:
    """However many are started meanwhile (subprocess reaps what nobody refers to)."""
    failed = Child.start(ending("os._exit(3)"), [])
    killed = Child.start(ending("os.kill(os.getpid(), signal.SIGKILL)"), [])
    await asyncio.gather(failed.ended(), killed.ended())
    assert is_there(failed.pid)
    assert await Child.start(ending(""), []).wait() == 0
    assert (failed.reap(), killed.reap()) == (3, -signal.SIGKILL)
    assert (failed.reap(), await killed.wait()) == (3, -signal.SIGKILL)
    assert not is_there(failed.pid)
    failed.kill()


@pytest.mark.parametrize("ended", [False, True])
async def test_one_that_was_there_before(ended: bool) -> None:
    pid = spawn("signal.pause()")
    if ended:
        os.kill(pid, signal.SIGKILL)
    child = Child(pid)
    child.terminate()
    assert await child.wait() == (-signal.SIGKILL if ended else -signal.SIGTERM)


async def test_no_such_program() -> None:
    with pytest.raises(UserError, match="program /nowhere/vdev: No such file"):
        Child.start(["/nowhere/vdev"], [])
