"""Running the programs as a user does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.frontend.server import Server
from tests.frontend.wire import TIMEOUT
from vdev.runtime import runtime_dir

VDEV = (sys.executable, "-m", "vdev")
# The programs' entry points, found without an installed console script.
VDEV_BLK = (sys.executable, "-c", "import sys; from vdev.cli.backend import blk; sys.exit(blk())")
VDEV_NET = (sys.executable, "-c", "import sys; from vdev.cli.backend import net; sys.exit(net())")


class Run(Protocol):
    """Runs a program to its end."""

    def __call__(
        self, *arguments: object, program: Sequence[str] = VDEV, **options: Any
    ) -> subprocess.CompletedProcess[str]: ...


class Start(Protocol):
    """Starts a server, waits until it is ready, ends it with the test."""

    def __call__(
        self, *arguments: object, program: Sequence[str] = VDEV, **environment: str
    ) -> Server: ...


def control_socket(pid: int) -> Path:
    return runtime_dir() / f"{pid}.sock"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: socket paths in it are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def disk(folder: Path) -> str:
    with open("disk.img", "wb") as file:
        file.truncate(1 << 20)
    return "disk.img"


@pytest.fixture
def vdev(folder: Path) -> Run:
    def run(
        *arguments: object, program: Sequence[str] = VDEV, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT,
            **options,
        )

    return run


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, program: Sequence[str] = VDEV, **environment: str) -> Server:
            return stack.enter_context(Server([*program, *map(str, arguments)], env=environment))

        yield start


@pytest.fixture
def refused(folder: Path) -> Callable[..., str]:
    """The one line that a mistake is answered with: exit code 2 and nothing left behind."""

    def refused(*arguments: object, program: Sequence[str] = VDEV, **options: Any) -> str:
        before = sorted(os.listdir(folder))
        with subprocess.Popen(
            [*program, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        ) as process:
            output: str
            errors: str
            output, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2, errors
        assert output == ""
        assert len(errors.splitlines()) == 1, errors
        assert sorted(os.listdir(folder)) == before
        assert not control_socket(process.pid).exists()
        return errors.rstrip("\n")

    return refused
