"""A network interface of the host, looked at and set by rtnetlink(7).

pyroute2 can do this too, but takes longer to import than all else that starts a machine; so what
every tap needs is asked here, and it is imported for what few need (`links.py`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

from vdev.record import Record

# linux/netlink.h, linux/rtnetlink.h
_NLMSG_ERROR, _RTM_NEWLINK, _RTM_GETLINK = 2, 16, 18
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLA_TYPE_MASK = 0x3FFF
# linux/if_link.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_TUN_TYPE, _IFLA_TUN_PI, _IFLA_TUN_VNET_HDR, _IFLA_TUN_MULTI_QUEUE = 3, 4, 5, 7
_IFF_UP, _IFF_TAP = 1, 2

_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, number, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, which to change
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_ERROR = struct.Struct("=i")  # struct nlmsgerr: 0, or a negative errno
_INT = struct.Struct("=I")
_ANSWER_MAX = 1 << 16


class TunInfo(NamedTuple):
    """What the tun driver tells of an interface."""

    is_tap: bool
    packet_info: bool
    vnet_header: bool
    multi_queue: bool


class Link(Record):
    """A network interface as it was when looked at; master: index of its bridge, or 0."""

    index: int
    name: str
    up: bool
    mtu: int
    master: int
    kind: str | None
    tun: TunInfo | None


def find_link(*, name: str | None = None, index: int = 0) -> Link | None:
    """The interface of that name or index, if there is one. Raises OSError."""
    attributes = {} if name is None else {_IFLA_IFNAME: os.fsencode(name) + b"\0"}
    try:
        return _link(_ask(_RTM_GETLINK, 0, index, 0, 0, attributes))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return None


def set_link(
    index: int,
    *,
    up: bool | None = None,
    mtu: int | None = None,
    master: int | None = None,
    address: bytes | None = None,
) -> None:
    """Changes what is given; master: index of a bridge, 0 = none. Raises OSError."""
    attributes = {} if address is None else {_IFLA_ADDRESS: address}
    for kind, value in ((_IFLA_MTU, mtu), (_IFLA_MASTER, master)):
        if value is not None:
            attributes[kind] = _INT.pack(value)
    flags, mask = (_IFF_UP if up else 0), (0 if up is None else _IFF_UP)
    _ask(_RTM_NEWLINK, _NLM_F_ACK, index, flags, mask, attributes)


def _ask(
    kind: int, options: int, index: int, flags: int, mask: int, attributes: dict[int, bytes]
) -> bytes:
    """The answer behind its header. Raises OSError."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, flags, mask)
    for number, value in attributes.items():
        head = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), number)
        body += head + value + bytes(-len(value) % 4)
    head = _MESSAGE.pack(_MESSAGE.size + len(body), kind, _NLM_F_REQUEST | options, 0, 0)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as kernel:
        kernel.connect((0, 0))
        kernel.send(head + body)
        answer = kernel.recv(_ANSWER_MAX)
    _, answered, *_ = _MESSAGE.unpack_from(answer)
    content = answer[_MESSAGE.size :]
    if answered == _NLMSG_ERROR:
        (error,) = _ERROR.unpack_from(content)
        if error:
            raise OSError(-error, os.strerror(-error))
    return content


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & _NLA_TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += max(length, _ATTRIBUTE.size) + -length % 4
    return found


def _link(answer: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(answer)
    found = _attributes(answer[_LINK.size :])
    info = _attributes(found.get(_IFLA_LINKINFO, b""))
    kind = _text(info[_IFLA_INFO_KIND]) if _IFLA_INFO_KIND in info else None
    tun = _attributes(info.get(_IFLA_INFO_DATA, b"")) if kind == "tun" else {}
    return Link(
        index=index,
        name=_text(found[_IFLA_IFNAME]),
        up=bool(flags & _IFF_UP),
        mtu=_INT.unpack(found[_IFLA_MTU])[0],
        master=_INT.unpack(found.get(_IFLA_MASTER, bytes(4)))[0],
        kind=kind,
        tun=TunInfo(
            is_tap=tun[_IFLA_TUN_TYPE] == bytes([_IFF_TAP]),
            packet_info=any(tun[_IFLA_TUN_PI]),
            vnet_header=any(tun[_IFLA_TUN_VNET_HDR]),
            multi_queue=any(tun[_IFLA_TUN_MULTI_QUEUE]),
        )
        if tun
        else None,
    )


def _text(value: bytes) -> str:
    return os.fsdecode(value.rstrip(b"\0"))
