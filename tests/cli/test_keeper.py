"""The keeper of a machine's process: what it does, and when, also if that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .machines import children_of, wait_for_end

_OWNER = """
import asyncio, sys
from pathlib import Path
from vdev.machines.keeper import Keeper

here = Path.cwd()  # the keeper's is another, so that it is in no file system's way

def tidy():
    (here / "tidy").touch()
    if "fails" in sys.argv:
        raise OSError

async def main():
    keeper = Keeper(tidy, (here / "afterwards").touch)
    print("forked", flush=True)
    sys.stdin.readline()
    keeper.close()
    print(Path("tidy").exists(), Path("afterwards").exists(), flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


@pytest.fixture
def owner(folder: Path, request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    words = getattr(request, "param", ())
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "forked\n"
    return process


@pytest.mark.parametrize("owner", [(), ("fails",)], indirect=True)
def test_a_clean_end(owner: subprocess.Popen[str]) -> None:
    (keeper,) = children_of(owner.pid)
    assert owner.stdin is not None
    assert owner.stdout is not None
    owner.stdin.write("\n")
    owner.stdin.flush()
    # `close` returns when all is tidy, and what needs the process gone is yet to be done.
    assert owner.stdout.readline() == "True False\n"
    output, errors = owner.communicate("\n")
    assert (owner.returncode, output, errors) == (0, "", "")
    wait_for_end(keeper)
    assert Path("afterwards").exists()


def test_a_killed_process(owner: subprocess.Popen[str]) -> None:
    (keeper,) = children_of(owner.pid)
    assert not Path("tidy").exists()
    # A terminal's, or a service manager's, word to all is not for it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(keeper, number)
    owner.kill()
    # Nothing of its owner's is open in it: pipes end with the owner.
    owner.communicate()
    wait_for_end(keeper)
    assert Path("tidy").exists()
    assert Path("afterwards").exists()
