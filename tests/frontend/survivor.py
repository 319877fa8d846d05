"""A disk's driver whose server may be killed at any time."""

from __future__ import annotations

import os
from pathlib import Path

from .blk import FEATURES, BlkClient
from .memory import GuestMemory
from .ring import SplitRing
from .session import PROTOCOL_WANTED
from .wire import Protocol, Wire

PROTOCOL = PROTOCOL_WANTED | Protocol.INFLIGHT_SHMFD


class Survivor(BlkClient):
    """Keeps memory, rings and the in-flight region, with which `reconnect` goes on."""

    def __init__(
        self,
        path: Path,
        *,
        queues: int = 1,
        size: int = 64,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        memory: GuestMemory | None = None,
    ) -> None:
        super().__init__(
            path,
            queues=queues,
            size=size,
            features=features,
            protocol=protocol,
            memory=memory,
            start=False,
        )
        self._path = path
        self._wanted = features, protocol
        self.inflight_fd = -1
        try:
            self.description, self.inflight_fd = self.get_inflight_fd(queues, size)
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self.inflight_fd >= 0:
            os.close(self.inflight_fd)
            self.inflight_fd = -1

    def reconnect(self, path: Path | None = None) -> None:
        """To the next server, after `wire.wait_closed()` or when no ring runs; it is waited for."""
        self.wire.close()
        self.wire = Wire.connect(path or self._path)
        self.protocol = 0
        features, protocol = self._wanted
        self.negotiate(features, protocol=protocol)
        self.share(self.memory)
        self._start()

    def _start(self) -> None:
        """The base is what QEMU says after it has lost a server: the used index, or, of a packed
        ring, which has none in memory, an old one."""
        self.set_inflight_fd(self.description, self.inflight_fd)
        for index, ring in enumerate(self.rings):
            self.start_ring(index, ring, base=ring.used_idx if isinstance(ring, SplitRing) else 0)
        self.driver_ok()
        self.barrier()
