"""What a process is to serve, told by the process that starts it.

Whoever is told may be another version of vdev's (``vdev upgrade --program``), which then refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from vdev.errors import UserError
from vdev.server.child import Child
from vdev.server.devices import DeviceSpec

FORMAT = 1
"""Of orders, of what comes through a passage, and of what a supervisor leaves to the next program:
another one is not understood."""


@dataclass(frozen=True)
class Orders:
    """What a worker is to do: serve `devices`.

    fds: the sockets that they are served on, where nobody serves them yet.
    channel: the descriptor of the connection to its supervisor, if it has one.
    passage: that of the passage from the process that serves now, if one does.
    succession: the first of as many numbers as there are devices, the same for all that follow it.
    patience: see `open_image`.
    """

    devices: list[DeviceSpec]
    iothreads: int
    poll_us: int
    loop: str
    fds: Sequence[int] = ()
    channel: int | None = None
    passage: int | None = None
    succession: int | None = None
    patience: float = 0.0

    @property
    def inherited(self) -> list[int]:
        """The descriptors that the process needs."""
        return [*self.fds, *(fd for fd in (self.channel, self.passage) if fd is not None)]

    def write(self) -> int:
        """A file of them, for `read`; the caller's."""
        fd = os.memfd_create("vdev-orders", os.MFD_CLOEXEC)
        with open(fd, "w", closefd=False) as file:
            json.dump({"format": FORMAT, **asdict(self)}, file)
        return fd

    @classmethod
    def read(cls, fd: int) -> Self:
        """Raises UserError where they are of another version of vdev's."""
        with open(fd) as file:
            file.seek(0)
            found: dict[str, Any] = json.load(file)
        if (format := found.pop("format", None)) != FORMAT:
            raise UserError(f"orders of format {format}, but this is vdev with format {FORMAT}")
        devices = [DeviceSpec(**device) for device in found.pop("devices")]
        return cls(devices=devices, **found)

    def give(self, program: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
        """Starts `program` as a worker that has these orders.

        Raises UserError where there is no such program.
        """
        orders = self.write()
        try:
            return Child.start([*program, "worker", str(orders)], [*self.inherited, orders], env)
        finally:
            os.close(orders)
