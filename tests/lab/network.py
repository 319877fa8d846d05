"""Names and addresses for a lab's networks that clash with nothing on the host."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
from dataclasses import dataclass

from .process import ProcessError, run

_RANGE = ipaddress.IPv4Network("10.213.0.0/16")
_counter = itertools.count()


@dataclass(frozen=True)
class Network:
    """A bridge to be made by the server, and who is who on it."""

    bridge: str
    subnet: ipaddress.IPv4Network

    @property
    def host(self) -> str:
        """The bridge's own address."""
        return str(self.subnet[1])

    @property
    def host_cidr(self) -> str:
        """The bridge's own address with the prefix length."""
        return f"{self.host}/{self.subnet.prefixlen}"

    def guest_cidr(self, index: int) -> str:
        """The address of a guest's interface with the prefix length."""
        return f"{self.subnet[10 + index]}/{self.subnet.prefixlen}"


async def interfaces() -> dict[str, list[str]]:
    """The host's interfaces and their IPv4 addresses."""
    listing = json.loads(await run("ip", "-json", "-4", "address") or b"[]")
    links = json.loads(await run("ip", "-json", "link"))
    addresses: dict[str, list[str]] = {link["ifname"]: [] for link in links}
    for link in listing:
        if link:
            addresses[link["ifname"]] = [a["local"] for a in link["addr_info"]]
    return addresses


async def unused() -> Network:
    """A network that the host does not have yet; different for every process and call."""
    present = await interfaces()
    taken = {ipaddress.IPv4Address(a) for addresses in present.values() for a in addresses}
    number = next(_counter)
    bridge = f"vdev-{os.getpid() % 1_000_000}-{number}"
    subnets = list(_RANGE.subnets(new_prefix=24))
    first = (os.getpid() + number) % len(subnets)
    for subnet in subnets[first:] + subnets[:first]:
        if not any(address in subnet for address in taken):
            return Network(bridge, subnet)
    raise ProcessError(f"every network of {_RANGE} is in use on this host")


def mac(index: int) -> str:
    """A locally administered address for the index-th interface of this process's guests."""
    return f"52:54:00:{os.getpid() >> 8 & 0xFF:02x}:{os.getpid() & 0xFF:02x}:{index:02x}"
