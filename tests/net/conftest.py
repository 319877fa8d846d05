from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.net import FEATURES, NetClient
from tests.lab import host

from .namespace import Namespace, PacketPort
from .served import LOOPS, Served
from .switched import Plug, Switched


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


@pytest.fixture
def sw(tmp_path: Path) -> Iterator[Switched]:
    with Switched(tmp_path, "a", "b", "c") as switched:
        yield switched


@pytest.fixture
def plug(tmp_path: Path) -> Iterator[Plug]:
    """Connects a card to the port of this name, with so many buffers posted."""
    with contextlib.ExitStack() as stack:

        def connect(port: str, *, buffers: int = 8, features: int = FEATURES) -> NetClient:
            card = stack.enter_context(NetClient(tmp_path / port, features=features))
            card.post(buffers)
            return card

        yield connect
