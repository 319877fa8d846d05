"""The C tests of libvhost, as they are and under the sanitizers."""

from __future__ import annotations

import re

import pytest

from tests.native.build import ENVIRONMENT, KINDS, PROGRAMS, build, run

_STEPPED = ("test_inflight_kills", "test_batch")


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 5


@pytest.mark.parametrize(
    ("kind", "program"),
    [
        # Step by step through one thread, or by hand: there is little to find for the thread
        # sanitizer, which test_batch_drain is for.
        pytest.param(kind, program, marks=pytest.mark.long)
        if kind == "thread" and program.removesuffix("_packed") in _STEPPED
        else (kind, program)
        for kind in KINDS
        for program in PROGRAMS
    ],
)
def test_program(kind: str, program: str) -> None:
    """Run by itself, not by ``meson test``, which takes longer than most programs do."""
    output = run(str(build(kind) / "native" / "tests" / program), env=ENVIRONMENT)
    plan = re.fullmatch(r"1\.\.\d+(?: # SKIP (.*))?", output.splitlines()[-1])
    assert plan, f"{program} ended before its end:\n{output}"
    if plan[1]:
        pytest.skip(plan[1])
