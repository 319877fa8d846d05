"""`victim`: a vdev server as a real process, checked after every case of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .target import Target


class Holder:
    """One server for all cases, so that the catalogue is a soak test as well; a case that breaks
    it gets blamed, and the next one a fresh server."""

    def __init__(self, factory: pytest.TempPathFactory, loop: str) -> None:
        self._factory = factory
        self._loop = loop
        self._target: Target | None = None

    def get(self) -> Target:
        if self._target is None:
            self._target = Target(self._factory.mktemp("hostile"), self._loop)
        return self._target

    def drop(self) -> None:
        if self._target is not None:
            self._target.close()
        self._target = None


@pytest.fixture(scope="session", params=["uvloop", "asyncio"])
def holder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Holder]:
    """The whole catalogue on both event loops."""
    kept = Holder(tmp_path_factory, request.param)
    yield kept
    kept.drop()


@pytest.fixture
def victim(holder: Holder) -> Iterator[Target]:
    target = holder.get()
    yield target
    try:
        target.check_recovered()
    except BaseException:
        holder.drop()
        raise
