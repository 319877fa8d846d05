"""Every asynchronous test runs under asyncio in debug mode and under uvloop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import hypothesis
import pytest
import pytest_asyncio
import uvloop

pytest_plugins = ["tests.lab.skips", "tests.lab.lengths", "tests.lab.inner_tests"]

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "vdev", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("vdev")


def pytest_configure() -> None:
    """A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP ignored;
    children inherit that. Tests interrupt themselves, and hang up on what they start."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Many tests collect garbage to see what is left; thousands of tests to come are none, and to
    look at them each time took more than most tests do."""
    gc.collect()
    gc.freeze()


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_debug(True)
    return loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": _debug_loop, "uvloop": uvloop.new_event_loop}


def open_fds() -> Counter[str]:
    """What the descriptors of this process are open on."""
    names: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names[os.readlink(f"/proc/self/fd/{fd}").split("[")[0].split(":")[0]] += 1
        except FileNotFoundError:
            continue
    return names


@pytest_asyncio.fixture
async def fd_count() -> AsyncIterator[Callable[[], Counter[str]]]:
    """The test leaves as many descriptors open as it found, of each kind."""
    before = open_fds()
    yield open_fds
    await asyncio.sleep(0)
    assert open_fds() == before


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A test leaves the signals by which a program is ended as it found them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
