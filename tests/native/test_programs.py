"""The C tests of libvhost, as they are and under the sanitizers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native.build import KINDS, PROGRAMS, run


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 5


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_program(built: Callable[[str], Path], kind: str, program: str) -> None:
    output = run(
        *("meson", "test", "-C", str(built(kind)), "--no-rebuild", "--print-errorlogs"),
        *("--num-processes", "1", program),
    )
    if re.search(r"^Skipped: +1$", output, re.MULTILINE):
        pytest.skip("no usable KVM here")
