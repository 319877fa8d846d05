"""Telling the service manager about our state (sd_notify(3), the NOTIFY_SOCKET protocol)."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send ``state`` ("READY=1", "STOPPING=1") to $NOTIFY_SOCKET; False where nobody asked.

    A service manager that went away is no reason to stop serving, so errors are swallowed.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            return False
    return True
