"""Network interfaces of the host, through rtnetlink (pyroute2).

pyroute2's sockets want an event loop that opens datagram sockets of any family; uvloop's takes
only those of IP.  So `on_links` runs a whole operation in a thread, in a plain loop of its own,
whatever loop the caller has.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pyroute2 import AsyncIPRoute

T = TypeVar("T")
Interface = IPv4Interface | IPv6Interface
_IFF_UP = 1
_TUN_TYPE_TAP = 2


@dataclass(frozen=True, slots=True)
class TunInfo:
    """What the tun driver tells of an interface."""

    is_tap: bool
    packet_info: bool
    vnet_header: bool
    multi_queue: bool


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface as it was when looked at; master: index of its bridge, or 0."""

    index: int
    name: str
    up: bool
    mtu: int
    master: int
    kind: str | None
    tun: TunInfo | None


class Links:
    """The host's interfaces; every method raises OSError where the kernel refuses."""

    def __init__(self, route: AsyncIPRoute) -> None:
        self._route = route

    async def find(self, name: str) -> Link | None:
        return await self._get(ifname=name)

    async def at(self, index: int) -> Link | None:
        return await self._get(index=index)

    async def _get(self, **which: Any) -> Link | None:
        try:
            with _as_os_error():
                return _link((await self._route.link("get", **which))[0])
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    async def ports(self, bridge: int) -> list[Link]:
        """The interfaces plugged into the bridge of this index."""
        with _as_os_error():
            links = [_link(message) async for message in await self._route.get_links()]
        return [link for link in links if link.master == bridge]

    async def add_bridge(self, name: str, mac: str) -> Link:
        with _as_os_error():
            await self._route.link("add", ifname=name, kind="bridge", address=mac)
        link = await self.find(name)
        if link is None:
            raise OSError(errno.ENODEV, "it was removed as soon as it was made", name)
        return link

    async def delete(self, index: int) -> None:
        with _as_os_error():
            await self._route.link("del", index=index)

    async def change(self, index: int, **settings: Any) -> None:
        """Settings of a link in pyroute2's words: state, mtu, master, address."""
        with _as_os_error():
            await self._route.link("set", index=index, **settings)

    async def addresses(self, index: int) -> set[str]:
        """The IP addresses of an interface, as "address/prefix length"."""
        with _as_os_error():
            return {
                f"{message.get('address')}/{message['prefixlen']}"
                async for message in await self._route.get_addr(index=index)
            }

    async def add_address(self, index: int, address: Interface) -> None:
        await self._change_address("add", index, address)

    async def delete_address(self, index: int, address: Interface) -> None:
        await self._change_address("del", index, address)

    async def _change_address(self, command: str, index: int, address: Interface) -> None:
        with _as_os_error():
            await self._route.addr(
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
    from pyroute2 import AsyncIPRoute

    async def main() -> T:
        async with AsyncIPRoute() as route:
            return await operation(Links(route))

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


def _link(message: Any) -> Link:
    info = message.get("linkinfo")
    kind = info.get("kind") if info else None
    data = info.get("data") if kind == "tun" else None
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        up=bool(message["flags"] & _IFF_UP),
        mtu=message.get("mtu"),
        master=message.get("master") or 0,
        kind=kind,
        tun=TunInfo(
            is_tap=data.get("IFLA_TUN_TYPE") == _TUN_TYPE_TAP,
            packet_info=bool(data.get("IFLA_TUN_PI")),
            vnet_header=bool(data.get("IFLA_TUN_VNET_HDR")),
            multi_queue=bool(data.get("IFLA_TUN_MULTI_QUEUE")),
        )
        if data
        else None,
    )
