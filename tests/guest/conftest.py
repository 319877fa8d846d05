"""The lab for the guest tests. Guests are shared by the tests of a module where they can be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.lab import host
from tests.lab.lab import Lab


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def lab() -> AsyncIterator[Lab]:
    """The kernel, initrd and root file system, and a directory for everything else."""
    lacks = host.lacks_guest()
    if lacks:
        pytest.skip(lacks)
    async with Lab() as made:
        yield made


@pytest.fixture(scope="session")
def networking() -> None:
    """What a test needs whose guest has a network card."""
    lacks = host.lacks_network()
    if lacks:
        pytest.skip(lacks)
