"""The signals by which a program is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Has the running loop call `stop` for SIGTERM, SIGINT and SIGHUP until the block ends.

    Taken back there: uvloop's handlers would outlive their loop, and Ctrl-C do nothing any more.
    """
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup(1) wants hang-ups to be nobody's business.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stop)
                stack.callback(loop.remove_signal_handler, number)
        yield
