"""What the tests boot. They run where /dev/kvm works: in the KVM lab or on a host that has it.

From the outside ``pytest tests/vmm/kvm`` works as for any other tests (tests/lab/inner_tests.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.lab import innermost, rootfs
from tests.lab.innermost import Material


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """One loop is enough: an emulated machine is slow."""
    return {"kvm": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def material() -> Material:
    """Debian's kernels and an initrd for the innermost guest."""
    return asyncio.run(innermost.prepare())


@pytest.fixture(scope="session")
def tools() -> Path:
    """A disk with a Debian userland that has fio and iperf3; for reading only."""
    return asyncio.run(rootfs.build())
