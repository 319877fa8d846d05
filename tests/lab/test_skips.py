"""The rule about skips, tried on a run of pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]


def _pytest(directory: Path, body: str, ci: str) -> subprocess.CompletedProcess[str]:
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "test_it.py").write_text(f"import pytest\n\n{body}\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.lab.skips", "-q", "test_it.py"]
    return subprocess.run(
        command,
        cwd=directory,
        env={"CI": ci, "PYTHONPATH": str(_TOP), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


_UNLISTED = 'def test_it():\n    pytest.skip("no moon here")'
_MODULE = 'pytest.skip("no moon here", allow_module_level=True)'
_LISTED = 'def test_it():\n    pytest.skip("no usable KVM here: /dev/kvm is missing")'
_EXPECTED = "@pytest.mark.xfail\ndef test_it():\n    assert False"


@pytest.mark.parametrize("body", [_UNLISTED, f"{_MODULE}\n\ndef test_it(): pass"])
def test_in_ci_an_unlisted_skip_fails_and_is_named(tmp_path: Path, body: str) -> None:
    run = _pytest(tmp_path, f"def test_good(): pass\n\n{body}", "true")
    assert run.returncode != 0
    assert "skips that are not on the list" in run.stdout
    assert "no moon here" in run.stdout


@pytest.mark.parametrize("body", [_LISTED, _EXPECTED])
def test_in_ci_other_skips_pass(tmp_path: Path, body: str) -> None:
    assert _pytest(tmp_path, body, "true").returncode == 0


def test_outside_ci_a_skip_is_only_a_skip(tmp_path: Path) -> None:
    assert _pytest(tmp_path, _UNLISTED, "").returncode == 0
