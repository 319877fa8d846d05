"""A tap: the network interface whose wire is a file descriptor of ours.

Each queue of the tap is one fd.  Frames carry a virtio-net header (IFF_VNET_HDR), whose length and
byte order, and the offloads that the reader accepts, are set as the guest negotiates them.

A tap that this process makes is not persistent: the kernel removes it with the last fd, however
the process ends.  A tap that was there before keeps some of what its user set, so `TapState` holds
what to put back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vdev.descriptors import Descriptors
from vdev.errors import UserError

DEVICE = "/dev/net/tun"
NAME_MAX = 15  # IFNAMSIZ with its NUL
QUEUES_MAX = 128  # rings of one vhost-user device have indexes of 8 bits
MTU_USUAL = 1500  # Ethernet's
MTU_MAX = 65535 - 14  # what the kernel gives a tap: a frame has 16 bits of length

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_TUNSETQUEUE = 0x400454D9
_TUNSETOFFLOAD = 0x400454D0
_TUNGETVNETHDRSZ = 0x800454D7
_TUNSETVNETHDRSZ = 0x400454D8
_TUNGETVNETLE = 0x800454DD
_TUNSETVNETLE = 0x400454DC
_TUNSETCARRIER = 0x400454E2
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_MULTI_QUEUE = 0x0100
_IFF_TUN_EXCL = 0x8000
_IFF_ATTACH_QUEUE = 0x0200
_IFF_DETACH_QUEUE = 0x0400
# linux/sockios.h
_SIOCSIFMTU = 0x8922

_IFREQ_FLAGS = struct.Struct("16sH22x")
_IFREQ_MTU = struct.Struct("16si20x")
_INT = struct.Struct("i")

OFFLOAD_CSUM = 0x01
OFFLOAD_TSO4 = 0x02
OFFLOAD_TSO6 = 0x04
OFFLOAD_TSO_ECN = 0x08


class TapState(NamedTuple):
    """What an existing tap is put back to when nobody holds it: its flags and header format."""

    name: str
    packet_info: bool
    vnet_header: bool
    multi_queue: bool
    header_len: int
    little_endian: bool


def check_name(name: str) -> str:
    """`name`, if the kernel takes it as an interface's name; else raises UserError."""
    encoded = os.fsencode(name)
    if not encoded:
        raise UserError("an interface has an empty name: give 1 to 15 characters")
    if len(encoded) > NAME_MAX:
        raise UserError(
            f"interface name {name!r} has {len(encoded)} characters: at most {NAME_MAX}"
        )
    if name in (".", "..") or any(c in "/:%" or c.isspace() or not c.isprintable() for c in name):
        raise UserError(f"interface name {name!r}: no spaces, '/', ':' or '%', and not '.' or '..'")
    return name


class Tap:
    """An open tap with one fd a queue; all queues but the first are detached at first."""

    def __init__(self, name: str, fds: list[int], *, created: bool) -> None:
        self.name = name
        self.fds = fds
        self.created = created
        self._attached = [True] * len(fds)

    @classmethod
    def create(cls, name: str, queues: int = 1) -> Tap:
        """Makes the tap `name`, which must not exist; "%d" in it stands for the next free number.

        Raises UserError where the host does not allow it.
        """
        return cls._open(name, queues, multi_queue=queues > 1, created=True)

    @classmethod
    def attach(cls, name: str, queues: int = 1, *, multi_queue: bool) -> Tap:
        """Opens the existing tap `name`, made for several queues or not. Raises UserError."""
        if queues > 1 and not multi_queue:
            raise UserError(
                f"tap {name}: {queues} queues wanted, but it was made for one; "
                "make it with: ip tuntap add mode tap multi_queue"
            )
        return cls._open(name, queues, multi_queue=multi_queue, created=False)

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> Tap:
        """A tap whose queues another process opened, by `create` or `attach`: all but the first are
        detached.  The descriptors stay the caller's.

        Raises UserError where they are not the queues of one tap that has a virtio-net header.
        """
        tap = cls("", [os.dup(fd) for fd in fds], created=False)
        tap._attached[1:] = [False] * (len(fds) - 1)
        try:
            tap.name = _opened_name(tap.fds[0])
            for queue in range(1, len(fds)):
                tap.attach_queue(queue, True)
                name = _opened_name(tap.fds[queue])
                tap.attach_queue(queue, False)
                if name != tap.name:
                    raise UserError(f"tap {tap.name}: queue {queue} is one of {name}")
        except OSError as error:
            tap.close()
            raise UserError(f"tap {tap.name}: no open queue of a tap ({error.strerror})") from None
        except BaseException:
            tap.close()
            raise
        return tap

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """The tap, for `restore` in another process."""
        return {
            "name": self.name,
            "created": self.created,
            "queues": [fds.put(fd) for fd in self.fds],
            "attached": self._attached,
        }

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors) -> Tap:
        """What `save` gave; frames go on coming meanwhile, so that no queue is asked whose it is.

        Raises ValueError, KeyError or TypeError where it did not.
        """
        queues = [fds.take(place) for place in state["queues"]]
        tap = cls(str(state["name"]), queues, created=bool(state["created"]))
        tap._attached = [
            bool(attached) for attached, _ in zip(state["attached"], queues, strict=True)
        ]
        return tap

    @classmethod
    def _open(cls, name: str, queues: int, *, multi_queue: bool, created: bool) -> Tap:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi_queue else 0)
        fds: list[int] = []
        try:
            for _ in range(queues):
                fds.append(_open_device())
                exclusive = _IFF_TUN_EXCL if created and len(fds) == 1 else 0
                name = _set_interface(fds[-1], name, flags | exclusive)
            tap = cls(name, fds, created=created)
            for queue in range(1, queues):
                tap.attach_queue(queue, False)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return tap

    @property
    def header_len(self) -> int:
        """Length of the virtio-net header in bytes."""
        return _get_int(self.fds[0], _TUNGETVNETHDRSZ)

    @property
    def little_endian(self) -> bool:
        """Whether the header is little endian on any host (VERSION_1)."""
        return bool(_get_int(self.fds[0], _TUNGETVNETLE))

    def set_header(self, length: int, *, little_endian: bool) -> None:
        """Sets length in bytes (10 or 12) and byte order of the header of every frame."""
        fcntl.ioctl(self.fds[0], _TUNSETVNETHDRSZ, _INT.pack(length))
        fcntl.ioctl(self.fds[0], _TUNSETVNETLE, _INT.pack(little_endian))

    def set_offloads(self, offloads: int) -> None:
        """What whoever reads the tap can take unfinished: a sum of OFFLOAD_ constants."""
        fcntl.ioctl(self.fds[0], _TUNSETOFFLOAD, offloads)

    def attach_queue(self, queue: int, on: bool) -> None:
        """Has the kernel send frames to this queue, or not; only taps of several queues can."""
        if self._attached[queue] == on:
            return
        request = _IFREQ_FLAGS.pack(b"", _IFF_ATTACH_QUEUE if on else _IFF_DETACH_QUEUE)
        fcntl.ioctl(self.fds[queue], _TUNSETQUEUE, request)
        self._attached[queue] = on

    def set_mtu(self, mtu: int) -> None:
        """Sets the interface's MTU in bytes; what a tap cannot have becomes the most it can."""
        request = _IFREQ_MTU.pack(os.fsencode(self.name), min(mtu, MTU_MAX))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFMTU, request)

    def set_carrier(self, on: bool) -> None:
        """Plugs or pulls the interface's cable, as the host sees it."""
        fcntl.ioctl(self.fds[0], _TUNSETCARRIER, _INT.pack(on))

    def send(self, frame: bytes) -> None:
        """Sends one Ethernet frame into the network, as the guest would."""
        os.write(self.fds[0], bytes(self.header_len) + frame)

    def close(self) -> None:
        """Closes all queues; a tap made here goes away once nobody else holds it."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def restore(state: TapState) -> None:
    """Puts flags and header of an existing tap, which nobody holds, back. Raises OSError.

    The offloads belong to whoever reads the tap: with no reader there are none.
    """
    flags = _IFF_TAP
    flags |= 0 if state.packet_info else _IFF_NO_PI
    flags |= _IFF_VNET_HDR if state.vnet_header else 0
    flags |= _IFF_MULTI_QUEUE if state.multi_queue else 0
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ_FLAGS.pack(os.fsencode(state.name), flags))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, _INT.pack(state.header_len))
        fcntl.ioctl(fd, _TUNSETVNETLE, _INT.pack(state.little_endian))
    finally:
        os.close(fd)


def _open_device() -> int:
    with _explained(DEVICE):
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def _set_interface(fd: int, name: str, flags: int) -> str:
    with _explained(f"tap {name}"):
        answer = fcntl.ioctl(fd, _TUNSETIFF, _IFREQ_FLAGS.pack(os.fsencode(name), flags))
    chosen: bytes = _IFREQ_FLAGS.unpack(answer)[0]
    return os.fsdecode(chosen.rstrip(b"\0"))


def _opened_name(fd: int) -> str:
    raw, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ_FLAGS.size)))
    name = os.fsdecode(raw.rstrip(b"\0"))
    wanted = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    if flags & wanted != wanted:
        raise UserError(f"tap {name}: opened with the flags {flags:#x}: {wanted:#x} are needed")
    return name


def _get_int(fd: int, request: int) -> int:
    value: int = _INT.unpack(fcntl.ioctl(fd, request, bytes(_INT.size)))[0]
    return value


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the kernel refuses into what the user can do about it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return (
                "this kernel has no tun driver: modprobe tun; "
                "in a container, pass the device in (--device /dev/net/tun)"
            )
        case errno.EACCES:
            return "no permission to open it: run as root, or be in the group that may"
        case errno.EPERM:
            return (
                "CAP_NET_ADMIN is lacking: run as root, or have a tap made for you: "
                "ip tuntap add NAME mode tap user YOU"
            )
        case errno.EBUSY:
            return "another process has it open"
        case errno.EINVAL:
            return "it is no tap that can be opened so (a tun, or of other flags)"
        case _:
            return os.strerror(error.errno or 0)
