"""Descriptors that go from one process to another beside a text, which names them by place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence


class Descriptors:
    """Those that go along, or came along, in their order.

    On the way out they stay the caller's; of those that came each is taken once.
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def put(self, fd: int) -> int | None:
        """Adds `fd`; its place, or None for -1, which is none."""
        if fd < 0:
            return None
        self._fds.append(fd)
        return len(self._fds) - 1

    def take(self, place: int | None) -> int:
        """The descriptor at that place, which is the caller's from now on; -1 for None.

        Raises ValueError where none came, or it was taken.
        """
        if place is None:
            return -1
        if not 0 <= place < len(self._fds) or self._fds[place] < 0:
            raise ValueError(f"there is no descriptor {place} of {len(self._fds)}")
        fd, self._fds[place] = self._fds[place], -1
        return fd

    def all(self) -> Sequence[int]:
        """Those on the way out."""
        return tuple(self._fds)

    def close(self) -> None:
        """Closes those that nobody took."""
        for fd in self._fds:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fds.clear()
