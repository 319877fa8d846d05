"""The keeper: a child that tidies up behind a machine's process, however that ends.

A confined process cannot take a bridge away, nor its control socket, and a killed one can do
nothing at all.  So a child is forked before, which keeps the rights and waits for one thing, the
end of its parent.  It takes no requests: what it will do is settled when it is forked, and it hears
one byte, or the end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Collection

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


class Keeper:
    """Forks.

    tidy: what to do when the process says that it is done (`close`), or is gone.
    afterwards: what to do when it is gone.  Both run in the child, and what they raise is lost.
    """

    def __init__(self, tidy: Callable[[], None], afterwards: Callable[[], None]) -> None:
        told, self._tell = os.pipe2(os.O_CLOEXEC)
        self._done, done = os.pipe2(os.O_CLOEXEC)
        owner = os.pidfd_open(os.getpid())
        needed = (told, done, owner)
        fork_aside(needed, lambda: _keep(told, done, owner, tidy, afterwards))
        for fd in needed:
            os.close(fd)

    def close(self) -> None:
        """Returns when all is tidy but for what `afterwards` does."""
        if self._tell < 0:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._tell, b"\0")
        os.read(self._done, 1)
        os.close(self._tell)
        os.close(self._done)
        self._tell = -1


def fork_aside(needed: Collection[int], act: Callable[[], None]) -> None:
    """Forks a child that has `needed` open and nothing else, acts, and ends; what is raised there
    is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if os.fork() == 0:
        try:
            _settle(needed)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            act()
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(needed: Collection[int]) -> None:
    """In the child: nothing of the parent's stays open, and its terminal's signals are its own."""
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    start = 3
    for fd in sorted(needed):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")


def _keep(
    told: int, done: int, owner: int, tidy: Callable[[], None], afterwards: Callable[[], None]
) -> None:
    if not os.read(told, 1):
        # Killed: a moment later its descriptors, and with them its taps and locks, are gone.
        select.select([owner], [], [])
    with contextlib.suppress(Exception):
        tidy()
    os.close(done)
    select.select([owner], [], [])
    with contextlib.suppress(Exception):
        afterwards()
