"""The linters are tests: what they say is in the failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = [name for name in ("vdev", "tests", "perf") if (ROOT / name).is_dir()]
C = sorted(str(path) for end in ("c", "h") for path in (ROOT / "native").rglob(f"*.{end}"))
BIN = Path(sys.executable).parent

COMMANDS = {
    "ruff check": ["ruff", "check", "--no-cache", *PYTHON],
    "ruff format": ["ruff", "format", "--no-cache", "--check", *PYTHON],
    "mypy": ["mypy", "--strict", *PYTHON],
    "clang-format": ["clang-format", "--dry-run", "-Werror", *C],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_linter(command: list[str]) -> None:
    program, *arguments = command
    done = subprocess.run(
        [BIN / program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join([program, *arguments[:2]])}\n{done.stdout}"
