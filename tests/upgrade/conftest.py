from __future__ import annotations

import pytest

from tests.frontend.replaced import reap_orphans


@pytest.fixture(autouse=True)
def orphans() -> None:
    """Each server's end is seen."""
    reap_orphans()
