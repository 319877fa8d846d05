"""A terminal for a program that takes its console on no descriptor of another kind."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
import tty
from collections.abc import Callable

_READ = 1 << 16


class Terminal:
    """A raw pseudo terminal; `on_output(data)` gets what is written to its other end.

    stdin, stdout: that end, twice, since a program may make one of them non-blocking; they are
    closed by `hand_over`.
    """

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self._fd, self.stdin = os.openpty()
        self.stdout = os.open(os.ttyname(self.stdin), os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(self.stdin)
        os.set_blocking(self._fd, False)
        self._on_output = on_output
        self._ours = True
        self._typing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._fd, self._readable)

    def hand_over(self) -> None:
        """The program has its end."""
        if self._ours:
            self._ours = False
            os.close(self.stdin)
            os.close(self.stdout)

    async def gone(self) -> None:
        """Returns when nobody has the other end any more, and everything was read."""
        await asyncio.shield(self._gone)

    def close(self) -> None:
        """Hangs up."""
        self.hand_over()
        self._hang_up()
        os.close(self._fd)

    async def write(self, data: bytes) -> None:
        """Types `data`; returns when the other end has room for it, or is gone."""
        async with self._typing:
            while data and not self._gone.done():
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:
                    await self._room()
                except OSError:
                    return

    def resize(self, columns: int, rows: int) -> None:
        """Tells the other end of its size."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    async def _room(self) -> None:
        room: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._fd, _set, room)
        try:
            await asyncio.wait([room, self._gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not self._gone.done():
                self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        except OSError:  # EIO: the other end is closed
            data = b""
        if data:
            self._on_output(data)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        if not self._gone.done():
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._gone.set_result(None)


def _set(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
