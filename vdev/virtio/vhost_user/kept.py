"""Descriptors that come with messages, and are kept."""

from __future__ import annotations

import os

from vdev.errors import PeerError
from vdev.virtio.vhost_user.channel import close_fds
from vdev.virtio.vhost_user.ring import VringFd

_EVENTFD = "anon_inode:[eventfd]"


def eventfd(body: VringFd, fds: list[int]) -> int:
    """The descriptor that came along, or -1. Raises PeerError where it is no eventfd."""
    if not body.has_fd:
        return -1
    check_eventfd(fds[0], f"ring {body.ring}: the")
    return fds[0]


def check_eventfd(fd: int, whose: str) -> None:
    """Raises PeerError where the descriptor, of `whose` description, is something else."""
    # Reading or writing anything else could block the iothread, or reach a file.
    kind = os.readlink(f"/proc/self/fd/{fd}")
    if kind != _EVENTFD:
        raise PeerError(f"{whose} descriptor is {kind}, expected an eventfd")


def keep(old: int, fds: list[int]) -> int:
    """Closes what was held and holds what came; empties `fds`."""
    if old >= 0:
        close_fds([old])
    return fds.pop() if fds else -1
