"""The inputs that fuzzing has kept do no harm: run again under ASan and UBSan."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    program = build("address") / f"native/fuzz/fuzz_{target}"
    inputs = kept(target)
    assert inputs

    def run(some: list[Path]) -> None:
        assert f"{len(some)} inputs" in run_program(str(program), *map(str, some))

    shares = min(len(inputs), os.cpu_count() or 1)
    with ThreadPoolExecutor(shares) as pool:
        list(pool.map(run, [inputs[n::shares] for n in range(shares)]))


@pytest.mark.parametrize(("target", "run"), [("session", session.run), ("control", control.run)])
def test_python_targets(target: str, run: Callable[[bytes], None]) -> None:
    inputs = kept(target)
    assert inputs
    for path in inputs:
        run(path.read_bytes())
