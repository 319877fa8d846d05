"""What a front-end shares, mapped as its messages say."""

from __future__ import annotations

from vdev.dirtylog import DirtyLog
from vdev.inflight import InflightRegion
from vdev.memory import Region
from vdev.virtio.vhost_user.payloads import Inflight, Log, MemoryRegion


def map_region(region: MemoryRegion, fd: int) -> Region:
    """Raises PeerError, OSError as `Region.map` does."""
    return Region.map(
        fd,
        guest_addr=region.guest_addr,
        size=region.size,
        user_addr=region.user_addr,
        offset=region.mmap_offset,
    )


def map_log(log: Log, fd: int) -> DirtyLog:
    """Raises PeerError, OSError as `DirtyLog.map` does."""
    return DirtyLog.map(fd, offset=log.mmap_offset, size=log.mmap_size)


def map_inflight(inflight: Inflight, fd: int, *, packed: bool) -> InflightRegion:
    """Raises PeerError, OSError as `InflightRegion.map` does."""
    return InflightRegion.map(
        fd,
        offset=inflight.mmap_offset,
        num_queues=inflight.num_queues,
        queue_size=inflight.queue_size,
        packed=packed,
    )
