"""What a session knows of a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vdev.virtio.vhost_user.layout import Placement
from vdev.virtio.vhost_user.payloads import VringAddr


class VringFd(NamedTuple):
    """SET_VRING_KICK, CALL, ERR: whether a descriptor comes along for the ring."""

    ring: int
    has_fd: bool


@dataclass(slots=True)
class Ring:
    """What is known of a ring.

    placement: where it is, in guest addresses or IOVAs, from when it was started.
    base: where it goes on, or None while the front-end has not said.
    """

    index: int
    size: int = 0
    addresses: VringAddr | None = None
    base: int | None = None
    enabled: bool = False
    placement: Placement | None = None

    @property
    def started(self) -> bool:
        return self.placement is not None
