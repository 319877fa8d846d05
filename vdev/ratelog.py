"""Logging of what others cause: no peer and no guest can flood the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


class RateLimitedLog:
    """Warnings, at most `burst` in each `period` seconds; those left out are counted and told."""

    def __init__(
        self,
        log: Log,
        *,
        burst: int = 10,
        period: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._clock = clock
        self._since = clock()
        self._said = 0
        self._left_out = 0

    def warning(self, text: str, *args: object) -> None:
        now = self._clock()
        if now - self._since >= self._period:
            if self._left_out:
                self._log.warning("%d warnings more were left out", self._left_out)
            self._since, self._said, self._left_out = now, 0, 0
        if self._said >= self._burst:
            self._left_out += 1
            return
        self._said += 1
        self._log.warning(text, *args)
