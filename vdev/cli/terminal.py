"""A console on this terminal: raw while it lasts, as it was afterwards, whatever ends it.

Works without a terminal too: then input is copied until its end, and nothing is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from vdev.errors import UserError

DEFAULT_ESCAPE = "^]"
_READ = 4096


def parse_escape(text: str) -> int | None:
    """The byte of a key like ``^]``; None for ``none``. Raises UserError."""
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return ord(text[1].upper()) & 0x1F
    raise UserError(f"escape {text!r}: a key like ^] or ^A, or none")


class Terminal:
    """Standard input and output, for one conversation.

    escape: the byte that leaves.  resized: called with columns and rows, at first and whenever the
    window changes.
    """

    def __init__(self, escape: int | None, resized: Callable[[int, int], None]) -> None:
        self._in = sys.stdin.fileno()
        self._out = _Output(sys.stdout.fileno())
        self._escape = escape
        self._resized = resized
        self._saved: list[Any] | None = None

    @property
    def is_tty(self) -> bool:
        """Whether somebody sits there."""
        return os.isatty(self._in)

    async def converse(
        self, output: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]
    ) -> bool:
        """Shows `output` and types into `write`; True: the escape was typed, False: it ended."""
        with self._raw():
            shown = asyncio.ensure_future(self._show(output))
            typed = asyncio.ensure_future(self._type(write))
            try:
                await asyncio.wait([shown, typed], return_when=asyncio.FIRST_COMPLETED)
                if typed.done() and typed.result():
                    return True
                await shown
                return False
            finally:
                for task in (shown, typed):
                    task.cancel()
                await asyncio.gather(shown, typed, return_exceptions=True)

    async def _show(self, output: AsyncIterator[bytes]) -> None:
        async for data in output:
            await self._out.write(data)

    async def _type(self, write: Callable[[bytes], Awaitable[None]]) -> bool:
        """Until the escape (True) or the end of input (False)."""
        async for data in _input(self._in):
            if self.is_tty and self._escape is not None and self._escape in data:
                await write(data[: data.index(self._escape)])
                return True
            await write(data)
        return False

    @contextlib.contextmanager
    def _raw(self) -> Iterator[None]:
        try:
            self._saved = termios.tcgetattr(self._in)
        except termios.error:  # not a terminal, or one that has gone away
            yield
            return
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore)
            for number, handler in (
                (signal.SIGTSTP, self._suspend),
                (signal.SIGCONT, self._set_raw),
                (signal.SIGWINCH, self._tell_size),
            ):
                loop.add_signal_handler(number, handler)
                stack.callback(loop.remove_signal_handler, number)
            self._set_raw()
            yield

    def _set_raw(self) -> None:
        with contextlib.suppress(OSError, termios.error):  # it may go away at any time
            # In the background a terminal is not ours to change: doing so would stop us.
            if os.tcgetpgrp(self._in) == os.getpgrp():
                tty.setraw(self._in, termios.TCSANOW)
                self._tell_size()

    def _restore(self) -> None:
        if self._saved is None:
            return
        # From the background too: who brought us here wants his terminal back.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSANOW, self._saved)
        finally:
            signal.signal(signal.SIGTTOU, before)

    def _suspend(self) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _tell_size(self) -> None:
        with contextlib.suppress(OSError):
            self._resized(*os.get_terminal_size(self._in))


class _Output:
    """Writes without holding up the event loop, and without holding up the end of the program.

    A stalled terminal or pipe blocks a thread that nobody waits for.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._work: queue.SimpleQueue[tuple[bytes, Callable[[], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def write(self, data: bytes) -> None:
        """Returns once it is written, or cannot be."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def written() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(done.set)

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vdev-console", daemon=True)
            self._thread.start()
        self._work.put((data, written))
        await done.wait()

    def _run(self) -> None:
        while True:
            data, written = self._work.get()
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(self._fd, data) :]
            written()


async def _input(fd: int) -> AsyncIterator[bytes]:
    """What can be read from `fd`, until its end."""
    with contextlib.suppress(OSError):
        while True:
            await _readable(fd)
            if not (data := os.read(fd, _READ)):
                return
            yield data


async def _readable(fd: int) -> None:
    """Returns when a read would not block. Watched anew each time: what the event loop has seen
    before the last read says nothing about the next one."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:
        return  # a regular file or /dev/null: always ready
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
