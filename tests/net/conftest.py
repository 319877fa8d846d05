from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import host

from .namespace import Namespace


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    with Namespace() as namespace:
        yield namespace
