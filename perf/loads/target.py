"""A target whose server is one process: it rests and is looked at as that process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from perf.model import Place, Sample
from perf.process import Started

WARM_UP_SECONDS = 0.15


class ServerTarget(ABC):
    """A perf.model.Target; subclasses measure."""

    def __init__(self, server: Started, place: Place) -> None:
        self._server = server
        self._place = place

    def go_on(self) -> None:
        self._server.go_on()

    def rest(self) -> None:
        self._server.rest()

    def alive(self) -> str | None:
        return self._server.end()

    def log_tail(self) -> Sequence[str]:
        return self._server.log_tail()

    @abstractmethod
    def measure(self, seconds: float) -> Sample: ...
