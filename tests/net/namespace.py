"""A network namespace of a test's own, and things inside it.

Nothing has to be cleaned up: the namespace, with all its interfaces, ends with the last fd and
thread that refer to it.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_ETH_P_ALL = 3
TEST_TYPE = 0x88B5
"""The Ethernet type of test frames: IEEE's for local experiments."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_thread(function: Callable[[], T]) -> T:
    """`function()` in a thread of its own: what it does to its namespace ends with it."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result.result()


class Namespace:
    """A fresh network namespace without IPv6, so that the kernel says nothing by itself."""

    def __init__(self) -> None:
        def make() -> int:
            _check(_libc.unshare(_CLONE_NEWNET))
            for scope in ("all", "default"):
                path = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
                if path.exists():
                    path.write_text("1")
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        self.fd = in_thread(make)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def enter(self) -> None:
        """Moves the calling thread, and those that it starts, in here."""
        _check(_libc.setns(self.fd, _CLONE_NEWNET))

    def run(self, function: Callable[[], T]) -> T:
        """`function()` in here; sockets and tasks that it makes stay here."""

        def inside() -> T:
            self.enter()
            return function()

        return in_thread(inside)

    def argv(self, *argv: str | os.PathLike[str]) -> list[str]:
        """The command line that runs `argv` in here, in the same process."""
        return [
            "nsenter",
            f"--net=/proc/{os.getpid()}/fd/{self.fd}",
            *(os.fspath(arg) for arg in argv),
        ]

    def ip(self, command: str) -> str:
        """What `ip COMMAND` prints."""
        done = subprocess.run(
            self.argv("ip", *command.split()), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"ip {command}: {done.stderr}"
        return done.stdout

    def link(self, name: str) -> dict[str, Any] | None:
        """What is known of an interface, or None if there is none of that name."""
        return self.links().get(name)

    def links(self) -> dict[str, dict[str, Any]]:
        return {link["ifname"]: link for link in json.loads(self.ip("-d -j link show"))}

    def names(self) -> set[str]:
        """The interfaces but the loopback."""
        return set(self.links()) - {"lo"}

    def addresses(self, name: str) -> list[str]:
        found = json.loads(self.ip(f"-j addr show dev {name}"))[0]["addr_info"]
        return [f"{a['local']}/{a['prefixlen']}" for a in found]

    def port(self, interface: str, *, vnet_header: bool = False) -> PacketPort:
        return self.run(lambda: PacketPort(interface, vnet_header))


class PacketPort:
    """Frames of the test's own Ethernet type on an interface of the namespace.

    With `vnet_header`, each has a 10-byte virtio-net header and may be a segment to be cut.
    """

    def __init__(self, interface: str, vnet_header: bool) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        self.socket.settimeout(10)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        if vnet_header:
            self.socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.socket.bind((interface, _ETH_P_ALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    def recv(self) -> bytes:
        """The next frame that came in from the guest."""
        while True:
            frame, address = self.socket.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING:
                return frame

    def recv_many(self, count: int) -> Sequence[bytes]:
        return [self.recv() for _ in range(count)]
