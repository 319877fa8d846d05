"""The virtio block device: features, config space and cache mode (virtio 1.3, section 5.2).

The requests themselves are served by the native engine; this is what surrounds them.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.blk.image import SECTOR, Image
from vdev.blk.options import ENGINES
from vdev.errors import PeerError, UserError
from vdev.iothread import IOThread
from vdev.memory import GuestMemory
from vdev.virtio.device import NativeDevice
from vdev.virtio.queue import QueueConfig, ServedQueue
from vdev.virtio.spec import RING_FEATURES

# Two descriptors of a 128-entry ring are the header and the status; the rest may be data.
SEG_MAX = 126
# What QEMU offers by default: as many 512-byte sectors as fit a signed 32-bit byte count.
MAX_RANGE_SECTORS = 0x3FFFFF
MAX_RANGES = 64
MAX_QUEUES = 256


def _bits(*features: int) -> int:
    return sum(1 << feature for feature in features)


class BlkDevice(NativeDevice):
    """A virtio-blk device over an open image; closing the device closes the image.

    ``serial`` is what a guest reads as the disk's identity: at most 20 bytes of ASCII.  The cache
    modes mean what they mean in QEMU:

    ============  =============  ======================  ====================
    mode          page cache     a write is durable      FLUSH
    ============  =============  ======================  ====================
    none          no (O_DIRECT)  after a FLUSH           makes durable
    writeback     yes            after a FLUSH           makes durable
    writethrough  yes            when it completes       makes durable
    unsafe        yes            when the host wants     does nothing
    ============  =============  ======================  ====================

    A driver that negotiated CONFIG_WCE may switch between the second and third, and one that
    knows neither FLUSH nor CONFIG_WCE is served write-through (section 5.2.6.2).
    """

    device_id = lib.VIRTIO_ID_BLOCK
    supports_inflight = True
    supports_iommu = True

    def __init__(
        self,
        image: Image,
        *,
        iothreads: Sequence[IOThread],
        name: str = "blk",
        num_queues: int = 1,
        serial: str | None = None,
        cache: str = "writeback",
        engine: str = "auto",
    ) -> None:
        if not 1 <= num_queues <= MAX_QUEUES:
            raise UserError(f"{num_queues} queues: a block device has 1 to {MAX_QUEUES}")
        if engine not in ENGINES:
            raise UserError(f"engine {engine!r} does not exist: {', '.join(ENGINES)}")
        self.name = name
        self.image = image
        # Now: the process may change its root and folder later.
        self._path = image.path if image.is_null else os.path.abspath(image.path)
        self.num_queues = num_queues
        self.cache = cache
        self.engine = engine
        self.features = self._offered()
        self._accepted = 0
        self._writeback = self._initial_writeback
        self._running = 0
        super().__init__(iothreads)
        self.native = self._new_native(serial_bytes(serial))
        self._apply_writeback()

    def _offered(self) -> int:
        features: int = RING_FEATURES | _bits(
            lib.VIRTIO_BLK_F_SEG_MAX,
            lib.VIRTIO_BLK_F_BLK_SIZE,
            lib.VIRTIO_BLK_F_TOPOLOGY,
            lib.VIRTIO_BLK_F_FLUSH,
            lib.VIRTIO_BLK_F_CONFIG_WCE,
        )
        if self.num_queues > 1:
            features |= _bits(lib.VIRTIO_BLK_F_MQ)
        if self.image.read_only:
            return features | _bits(lib.VIRTIO_BLK_F_RO)
        if self.image.can_discard:
            features |= _bits(lib.VIRTIO_BLK_F_DISCARD)
        return features | _bits(lib.VIRTIO_BLK_F_WRITE_ZEROES)

    def _new_native(self, identity: bytes) -> Any:
        image = self.image
        flags = 0
        if image.read_only:
            flags |= lib.VHOST_BLK_READ_ONLY
        if image.is_null:
            flags |= lib.VHOST_BLK_NULL
        if image.is_block_device:
            flags |= lib.VHOST_BLK_BLOCK_DEVICE
        if self.engine == "threads":
            flags |= lib.VHOST_BLK_THREADS
        if self.cache == "unsafe":
            flags |= lib.VHOST_BLK_NO_FLUSH
        config = ffi.new("struct vhost_blk_config *")
        config.fd = image.fd
        config.flags = flags
        config.capacity = self.capacity
        config.num_queues = self.num_queues
        config.seg_max = SEG_MAX
        config.max_discard_seg = MAX_RANGES
        config.max_discard_sectors = MAX_RANGE_SECTORS
        config.id = identity
        out = ffi.new("struct vhost_device **")
        result = lib.vhost_blk_new(config, out)
        if result < 0:
            raise OSError(-result, f"vhost_blk_new for {image.path}")
        return out[0]

    @property
    def capacity(self) -> int:
        """Size of the disk in sectors of 512 bytes."""
        return self.image.size // SECTOR

    @property
    def writeback(self) -> bool:
        """Whether a driver has to FLUSH to make its writes durable."""
        return self._writeback

    @property
    def _initial_writeback(self) -> bool:
        return self.cache != "writethrough"

    def config(self) -> bytes:
        """The whole config space (struct virtio_blk_config)."""
        image = self.image
        space = ffi.new("struct virtio_blk_config *")
        space.capacity = self.capacity
        space.seg_max = SEG_MAX
        space.blk_size = image.block_size
        space.physical_block_exp = max(
            0, (image.physical_block_size // image.block_size).bit_length() - 1
        )
        space.min_io_size = image.physical_block_size // image.block_size
        space.writeback = self._writeback
        space.num_queues = self.num_queues
        if self.features >> lib.VIRTIO_BLK_F_DISCARD & 1:
            space.max_discard_sectors = MAX_RANGE_SECTORS
            space.max_discard_seg = MAX_RANGES
            alignment = max(image.discard_granularity, image.block_size)
            space.discard_sector_alignment = alignment // SECTOR
        if self.features >> lib.VIRTIO_BLK_F_WRITE_ZEROES & 1:
            space.max_write_zeroes_sectors = MAX_RANGE_SECTORS
            space.max_write_zeroes_seg = MAX_RANGES
            space.write_zeroes_may_unmap = image.can_discard
        return bytes(ffi.buffer(space))

    def write_config(self, offset: int, data: bytes) -> None:
        """A driver's write to the config space: the writeback byte alone, with CONFIG_WCE.

        Raises PeerError for every other field, and for a value that is neither 0 nor 1.
        """
        if (offset, len(data)) != (ffi.offsetof("struct virtio_blk_config", "writeback"), 1):
            raise PeerError(
                f"write of {len(data)} bytes at {offset} of the block config space: "
                "only the writeback byte may be written (virtio 1.3, 5.2.4)"
            )
        if not self._accepted >> lib.VIRTIO_BLK_F_CONFIG_WCE & 1:
            raise PeerError("write of the writeback byte without VIRTIO_BLK_F_CONFIG_WCE")
        if data[0] > 1:
            raise PeerError(f"writeback byte {data[0]}: 0 is write-through, 1 is write-back")
        self._writeback = bool(data[0])
        self._apply_writeback()

    def negotiate(self, features: int) -> None:
        """Take the accepted features: they decide the cache mode (virtio 1.3, 5.2.6.2)."""
        self._accepted = features
        self._apply_writeback()

    def reset(self) -> None:
        """The features are forgotten; a driver's choice of write-through is not."""
        self._accepted = 0
        self._apply_writeback()

    def release(self) -> None:
        """Back to what a new front-end finds."""
        self._writeback = self._initial_writeback
        self.reset()

    def _apply_writeback(self) -> None:
        knows = _bits(lib.VIRTIO_BLK_F_FLUSH, lib.VIRTIO_BLK_F_CONFIG_WCE)
        lib.vhost_blk_set_writeback(
            self.native,
            self.cache == "unsafe" or (self._writeback and bool(self._accepted & knows)),
        )

    async def start_queue(
        self,
        config: QueueConfig,
        memory: GuestMemory,
        on_broken: Callable[[str], None] | None = None,
    ) -> ServedQueue:
        """Has the image locked from the first queue's start to the last one's stop, if so asked."""
        if self._running == 0:
            try:
                self.image.take()
            except UserError as error:
                raise OSError(errno.EBUSY, str(error)) from None
        self._running += 1
        try:
            queue = await super().start_queue(config, memory, on_broken)
        except BaseException:
            self._running -= 1
            if self._running == 0:
                self.image.give_back()
            raise
        queue.on_stopped = self._queue_stopped
        return queue

    def hold(self, on: bool) -> None:
        """The lock stays on the open image, which another process may have, too."""
        self._running += 1 if on else -1

    async def _queue_stopped(self) -> None:
        self._running -= 1
        if self._running == 0 and self.image.lock == "running":
            # Whoever takes it next may read it on another host.
            await asyncio.to_thread(self.image.flush)
            if self._running == 0:
                self.image.give_back()

    def save(self) -> dict[str, Any]:
        return {"writeback": self._writeback}

    def restore(self, state: dict[str, Any]) -> None:
        writeback = state.get("writeback")
        if not isinstance(writeback, bool) or len(state) != 1:
            raise ValueError(f"{self.name}: not the state of a block device")
        self._writeback = writeback
        self._apply_writeback()

    def describe(self) -> dict[str, Any]:
        """The image, by its absolute path, and how it is used."""
        image = self.image
        return {
            "kind": "blk",
            "image": {
                "path": self._path,
                "kind": image.kind,
                "size": image.size,
                "read_only": image.read_only,
                "cache": self.cache,
                "direct": image.direct,
                "writeback": self.writeback,
            },
        }

    def resize(self, size: int | None = None) -> int:
        """Grow the image to ``size`` bytes (None: take its present size) and tell the driver.

        Returns the new size in bytes.  Raises UserError where the image cannot be that large.
        """
        before = self.capacity
        self.image.resize(size)
        if self.capacity != before:
            lib.vhost_blk_set_capacity(self.native, self.capacity)
            self.notify_config()
        return self.image.size

    def close(self) -> None:
        """Free the native device and close the image.  Its queues have been stopped before."""
        super().close()
        self.image.close()


def serial_bytes(serial: str | None) -> bytes:
    """The 20 bytes that GET_ID answers: ``serial``, NUL-padded (virtio 1.3, 5.2.6)."""
    try:
        identity = (serial or "").encode("ascii")
    except UnicodeEncodeError:
        raise UserError(f"serial {serial!r}: a serial is ASCII") from None
    if len(identity) > lib.VIRTIO_BLK_ID_BYTES or not (serial or " ").isprintable():
        raise UserError(
            f"serial {serial!r}: at most {lib.VIRTIO_BLK_ID_BYTES} printable characters"
        )
    return identity.ljust(lib.VIRTIO_BLK_ID_BYTES, b"\0")
