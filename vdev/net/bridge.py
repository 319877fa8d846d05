"""A bridge of the host's kernel: made if it is missing, given an address, taps plugged into it.

Every step looks first, so doing it again changes nothing, and what it did change it records in the
journal as it does it.
"""

from __future__ import annotations

import errno
import hashlib
import os

from vdev.errors import UserError
from vdev.net.links import Interface, Link, Links
from vdev.net.state import Journal
from vdev.net.tap import check_name


async def ensure_bridge(links: Links, journal: Journal, name: str, mtu: int | None) -> Link:
    """The bridge `name`, up; one that is made here gets the MTU, and is recorded.

    Raises UserError where the interface is no bridge or may not be made.
    """
    check_name(name)
    bridge = await links.find(name)
    try:
        if bridge is None:
            bridge = await links.add_bridge(name, _stable_mac(name))
            journal.add({"undo": "delete bridge", "name": name, "index": bridge.index})
            if mtu is not None:
                await links.change(bridge.index, mtu=mtu)
            await links.change(bridge.index, state="up")
        elif bridge.kind != "bridge":
            raise UserError(
                f"bridge {name}: this interface exists and is no bridge "
                f"({bridge.kind or 'a network card'}): give another name"
            )
        elif not bridge.up:
            journal.add({"undo": "set down", "name": name, "index": bridge.index})
            await links.change(bridge.index, state="up")
    except OSError as error:
        raise UserError(f"bridge {name}: {reason(error)}") from error
    return await links.find(name) or bridge


async def add_address(links: Links, journal: Journal, link: Link, address: Interface) -> None:
    """Gives the interface the address, unless it has it. Raises UserError.

    On a bridge made here it stays as long as the bridge, which others may use by then.
    """
    try:
        if str(address) in await links.addresses(link.index):
            return
        await links.add_address(link.index, address)
    except OSError as error:
        raise UserError(f"address {address} for {link.name}: {reason(error)}") from error
    record = {"name": link.name, "index": link.index}
    if record | {"undo": "delete bridge"} not in journal.records:
        journal.add(record | {"undo": "delete address", "address": str(address)})


async def plug(links: Links, journal: Journal, tap: Link, bridge: Link, *, ours: bool) -> None:
    """Makes the tap a port of the bridge; recorded if the tap outlives us. Raises UserError."""
    if tap.master == bridge.index:
        return
    if tap.master:
        other = await links.at(tap.master)
        raise UserError(
            f"tap {tap.name}: already plugged into {other.name if other else 'another bridge'}, "
            f"not {bridge.name}: unplug it with: ip link set {tap.name} nomaster"
        )
    try:
        if not ours:
            journal.add({"undo": "unplug", "name": tap.name, "index": tap.index})
        else:
            await links.change(tap.index, address=_port_mac(tap.name))
        await links.change(tap.index, master=bridge.index)
    except OSError as error:
        raise UserError(f"tap {tap.name} into bridge {bridge.name}: {reason(error)}") from error


def reason(error: OSError) -> str:
    """Why the kernel refused, and what would be right."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return "CAP_NET_ADMIN is lacking: run as root"
        case errno.EOPNOTSUPP:
            return "this kernel has no such kind of interface: modprobe bridge"
        case _:
            return os.strerror(error.errno or 0)


def _stable_mac(name: str) -> str:
    """A fixed address, or a bridge would take that of its lowest port and change with them."""
    digest = hashlib.sha256(f"{os.uname().nodename} bridge {name}".encode()).digest()
    return _format((digest[0] & 0xFC) | 0x02, digest)


def _port_mac(name: str) -> str:
    """The highest there is: a bridge that goes by its lowest port's address will not take it."""
    return _format(0xFE, hashlib.sha256(f"{os.uname().nodename} port {name}".encode()).digest())


def _format(first: int, digest: bytes) -> str:
    return bytes([first, *digest[1:6]]).hex(":")
