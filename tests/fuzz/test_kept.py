"""The inputs that fuzzing has kept do no harm: run again under ASan and UBSan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import control, session
from tests.fuzz.__main__ import KEPT, PYTHON, TARGETS
from tests.native.build import build
from tests.native.build import run as run_program


def kept(target: str) -> list[Path]:
    return sorted((KEPT / target).iterdir())


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in PYTHON])
def test_native_targets(target: str) -> None:
    inputs = kept(target)
    program = build("address") / f"native/fuzz/fuzz_{target}"
    assert f"{len(inputs)} inputs" in run_program(str(program), *map(str, inputs))


@pytest.mark.parametrize(("target", "run"), [("session", session.run), ("control", control.run)])
def test_python_targets(target: str, run: Callable[[bytes], None]) -> None:
    inputs = kept(target)
    assert inputs
    for path in inputs:
        run(path.read_bytes())
