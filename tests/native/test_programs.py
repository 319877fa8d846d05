"""The C tests of libvhost, as they are and under the sanitizers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native.build import KINDS, PROGRAMS, run

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
def test_program(built: Callable[[str], Path], kind: str, program: str) -> None:
    output = run(
        *("meson", "test", "-C", str(built(kind)), "--no-rebuild", "--print-errorlogs"),
        *("--num-processes", "1", program),
    )
    if re.search(r"^Skipped: +1$", output, re.MULTILINE):
        pytest.skip("no usable KVM here")
