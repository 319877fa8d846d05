"""The rule about long tests, tried on a run of pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]
_BODY = """
import pytest

def test_short(): pass

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.long)])
def test_both(n): pass
"""
_SAID = "1 long tests were left out: make test-all runs them"


@pytest.mark.parametrize(
    ("arguments", "summary", "said"),
    [
        (["test_it.py"], "2 passed, 1 deselected", True),
        (["--all", "test_it.py"], "3 passed", False),
        (["test_it.py::test_both"], "2 passed", False),
        (["test_it.py::test_both[2]"], "1 passed", False),
        (["test_it.py::test_short", "test_it.py"], "2 passed, 1 deselected", True),
    ],
)
def test_long_ones_are_left_out_unless_asked_for(
    tmp_path: Path, arguments: list[str], summary: str, said: bool
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_it.py").write_text(_BODY)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.lab.lengths", "-q", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(_TOP), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert f"{summary} in " in run.stdout
    assert (_SAID in run.stdout) == said
