from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.net import NetClient
from tests.lab import host

from .namespace import Namespace, PacketPort
from .served import LOOPS, Served


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    with Namespace() as namespace:
        yield namespace


@pytest.fixture(params=LOOPS)
def card(ns: Namespace, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    with Served(ns, tmp_path / "s", tap="tap0", loop=request.param) as served:
        yield served


@pytest.fixture
def wire(ns: Namespace, card: Served) -> Iterator[PacketPort]:
    """The host's end of the card's tap."""
    with ns.port("tap0") as port:
        yield port


@pytest.fixture
def nic(card: Served) -> Iterator[NetClient]:
    with NetClient(card.path) as client:
        yield client
