from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.native.build import build


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """The directory of a kind of build, made when first asked for."""
    return cache(build)
