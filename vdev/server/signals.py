"""The signals by which a program is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Has the running loop call `stop` for SIGTERM, SIGINT and SIGHUP until the block ends; for
    those, too, that were held back when another program became this one.

    Taken back there: uvloop's handlers would outlive their loop, and Ctrl-C do nothing any more.
    """
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for number in _SIGNALS:
            # nohup(1) wants hang-ups to be nobody's business.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stop)
                stack.callback(loop.remove_signal_handler, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """They wait until the block ends, or, beyond an exec, for `on_signals`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
