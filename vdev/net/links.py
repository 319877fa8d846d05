"""Bridges and addresses of the host, through rtnetlink (pyroute2).

pyroute2 is imported where one is made or undone: a tap, also on a bridge that is there, needs
none of it (`rtnetlink.py`).  Its sockets want an event
loop that opens datagram sockets of any family; uvloop's takes only those of IP.  So `on_links` runs
a whole operation in a thread, in a plain loop of its own, whatever loop the caller has.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

from vdev.net.rtnetlink import Link, find_link

if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface

    from pyroute2 import AsyncIPRoute

    Interface = IPv4Interface | IPv6Interface

T = TypeVar("T")


class Links:
    """Within `async with`; every method raises OSError where the kernel refuses."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._opened: AsyncIPRoute | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _route(self) -> AsyncIPRoute:
        if self._opened is None:
            from pyroute2 import AsyncIPRoute

            self._opened = await self._stack.enter_async_context(AsyncIPRoute())
        return self._opened

    async def ports(self, bridge: int) -> list[int]:
        """The indexes of the interfaces plugged into the bridge of this index."""
        route = await self._route()
        with _as_os_error():
            links = [(link["index"], link.get("master")) async for link in await route.get_links()]
        return [index for index, master in links if master == bridge]

    async def add_bridge(self, name: str, mac: str) -> Link:
        route = await self._route()
        with _as_os_error():
            await route.link("add", ifname=name, kind="bridge", address=mac)
        link = find_link(name=name)
        if link is None:
            raise OSError(errno.ENODEV, "it was removed as soon as it was made", name)
        return link

    async def delete(self, index: int) -> None:
        route = await self._route()
        with _as_os_error():
            await route.link("del", index=index)

    async def addresses(self, index: int) -> set[str]:
        """The IP addresses of an interface, as "address/prefix length"."""
        route = await self._route()
        with _as_os_error():
            return {
                f"{message.get('address')}/{message['prefixlen']}"
                async for message in await route.get_addr(index=index)
            }

    async def add_address(self, index: int, address: Interface) -> None:
        await self._change_address("add", index, address)

    async def delete_address(self, index: int, address: Interface) -> None:
        await self._change_address("del", index, address)

    async def _change_address(self, command: str, index: int, address: Interface) -> None:
        route = await self._route()
        with _as_os_error():
            await route.addr(
                command, index=index, address=str(address.ip), prefixlen=address.network.prefixlen
            )


async def on_links(operation: Callable[[Links], Awaitable[T]]) -> T:
    """Runs `operation(links)` to its end, even if whoever waits for it is cancelled."""
    # A thread that ends with it: who confines this process may have no others.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="vdev-links") as thread:
        work = asyncio.get_running_loop().run_in_executor(thread, _run, operation)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise


def _run(operation: Callable[[Links], Awaitable[T]]) -> T:
    async def main() -> T:
        async with Links() as links:
            return await operation(links)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error
