"""The lab for the guest tests. Guests are shared by the tests of a module where they can be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import pytest_asyncio

from tests.lab import host
from tests.lab.lab import Lab


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Once is enough here: vdev runs in a process and on a loop of its own, this one only waits."""
    return {"lab": asyncio.new_event_loop}


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
