"""The console: history, watchers fast and slow, its end."""

from __future__ import annotations

import asyncio

from vdev.vmm.console import BACKLOG, HISTORY, Console


class Guest:
    """What reached the guest."""

    def __init__(self) -> None:
        self.typed = b""
        self.sizes: list[tuple[int, int]] = []
        self.console = Console(self.take, lambda columns, rows: self.sizes.append((columns, rows)))

    async def take(self, data: bytes) -> None:
        self.typed += data


async def read(console: Console, *, history: bool = True) -> bytes:
    return b"".join([data async for data in console.attach(history=history)])


async def test_watchers_see_the_history_and_what_follows() -> None:
    console = Guest().console
    console.feed(b"before ")
    both = asyncio.gather(read(console), read(console), read(console, history=False))
    await asyncio.sleep(0)
    console.feed(b"after")
    console.close()
    assert tuple(await both) == (b"before after", b"before after", b"after")


async def test_a_watcher_that_comes_too_late_sees_the_history() -> None:
    console = Guest().console
    console.feed(b"last words")
    console.close()
    assert await read(console) == b"last words"
    assert await read(console, history=False) == b""


async def test_history_is_bounded() -> None:
    console = Guest().console
    for _ in range(3):
        console.feed(b"x" * HISTORY)
    console.feed(b"end")
    assert len(console.history) == HISTORY
    assert console.history.endswith(b"xend")


async def test_a_slow_watcher_is_told_what_it_lost() -> None:
    console = Guest().console
    watch = console.attach()
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    console.feed(b"first")
    assert await first == b"first"
    console.feed(b"a" * BACKLOG)
    console.feed(b"b" * 10)
    data = await anext(watch)
    assert data.startswith(b"\r\n[10 bytes of output lost]\r\na")
    assert data.endswith(b"ab" + b"b" * 9)
    console.feed(b"on")
    assert await anext(watch) == b"on"
    await watch.aclose()


async def test_typing_and_sizes_until_the_end() -> None:
    guest = Guest()
    await guest.console.write(b"ls\n")
    guest.console.resize(80, 24)
    guest.console.resize(0, 24)
    guest.console.resize(80, 1 << 16)
    guest.console.close()
    await guest.console.write(b"lost")
    guest.console.resize(100, 30)
    assert guest.typed == b"ls\n"
    assert guest.sizes == [(80, 24)]
