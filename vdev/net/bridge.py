"""A bridge of the host's kernel: made if it is missing, given an address, taps plugged into it.

Every step looks first, so doing it again changes nothing, and what it did change it records in the
journal as it does it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from vdev.errors import UserError
from vdev.net.rtnetlink import Link, find_link, set_link
from vdev.net.state import Journal
from vdev.net.tap import check_name

if TYPE_CHECKING:
    from vdev.net.links import Interface, Links


async def ensure_bridge(links: Links, journal: Journal, name: str, mtu: int | None) -> Link:
    """The bridge `name`, up; one that is made here gets the MTU, and is recorded.

    Raises UserError where the interface is no bridge or may not be made.
    """
    check_name(name)
    bridge = find_link(name=name)
    try:
        if bridge is None:
            bridge = await links.add_bridge(name, _stable_mac(name).hex(":"))
            journal.add({"undo": "delete bridge", "name": name, "index": bridge.index})
            if mtu is not None:
                set_link(bridge.index, mtu=mtu)
            set_link(bridge.index, up=True)
        elif bridge.kind != "bridge":
            raise UserError(
                f"bridge {name}: this interface exists and is no bridge "
                f"({bridge.kind or 'a network card'}): give another name"
            )
        elif not bridge.up:
            journal.add({"undo": "set down", "name": name, "index": bridge.index})
            set_link(bridge.index, up=True)
    except OSError as error:
        raise UserError(f"bridge {name}: {reason(error)}") from error
    return find_link(name=name) or bridge


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


def plug(journal: Journal, tap: Link, bridge: Link, *, ours: bool) -> None:
    """Makes the tap a port of the bridge; recorded if the tap outlives us. Raises UserError."""
    if tap.master == bridge.index:
        return
    if tap.master:
        other = find_link(index=tap.master)
        raise UserError(
            f"tap {tap.name}: already plugged into {other.name if other else 'another bridge'}, "
            f"not {bridge.name}: unplug it with: ip link set {tap.name} nomaster"
        )
    try:
        if not ours:
            journal.add({"undo": "unplug", "name": tap.name, "index": tap.index})
        else:
            set_link(tap.index, address=_port_mac(tap.name))
        set_link(tap.index, master=bridge.index)
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


def _stable_mac(name: str) -> bytes:
    """A fixed address, or a bridge would take that of its lowest port and change with them."""
    digest = _digest("bridge", name)
    return bytes([(digest[0] & 0xFC) | 0x02, *digest[1:6]])


def _port_mac(name: str) -> bytes:
    """The highest there is: a bridge that goes by its lowest port's address will not take it."""
    return bytes([0xFE, *_digest("port", name)[1:6]])


def _digest(what: str, name: str) -> bytes:
    import hashlib  # maps a library of 5 MiB

    return hashlib.sha256(f"{os.uname().nodename} {what} {name}".encode()).digest()
