from __future__ import annotations

from collections.abc import Iterator

import pytest

from .namespace import Namespace


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    try:
        namespace = Namespace()
    except PermissionError:
        pytest.skip("this host lacks CAP_NET_ADMIN and CAP_SYS_ADMIN for network namespaces")
    with namespace:
        yield namespace
