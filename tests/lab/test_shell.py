"""Shell scripts are checked like everything else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]
_SCRIPTS = (".ci/run", *(str(path.relative_to(_TOP)) for path in _TOP.glob("tests/**/*.sh")))


@pytest.mark.parametrize("script", _SCRIPTS)
def test_shellcheck(script: str) -> None:
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("no shellcheck here (`make setup` installs it)")
    run = subprocess.run([shellcheck, script], cwd=_TOP, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
