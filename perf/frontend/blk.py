"""The front-end of a vhost-user-blk back-end, and the C driver's loads on its queues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf.frontend.connection import RING_FEATURES, Connection, check
from vdev._native import ffi, lib

WANTED_PROTOCOL = 1 << lib.VHOST_USER_PROTOCOL_F_CONFIG | 1 << lib.VHOST_USER_PROTOCOL_F_MQ
CAPACITY_SIZE = 8
STALL_MS = 5000
_SLOT = 4096  # of a request's own, beside its data (struct vhost_load_config)


@dataclass(frozen=True)
class Pattern:
    """What the driver sends; sizes in bytes.

    The area of the disk is `span` bytes from `start`; 0 = all the rest of it. `poll`: spin instead
    of sleeping on the call eventfd. `verify`: stamp what is written, check the stamps of what is
    read.
    """

    depth: int = 32
    block_size: int = 4096
    write_percent: int = 0
    random: bool = True
    poll: bool = True
    verify: bool = False
    start: int = 0
    span: int = 0
    seed: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of a pattern; times in seconds; `latency`: counts a histogram bucket."""

    requests: int
    bytes: int
    errors: int
    corrupt: int
    kicks: int
    sleeps: int
    seconds: float
    driver_cpu_seconds: float
    latency: tuple[int, ...]


class BlkFrontend(Connection):
    """A connection and `queues` rings of `queue_size`, each with room for `depth` requests.

    `features`, `protocol`: which to take, RING_PACKED among them for packed rings, RING_IN_ORDER
    for requests that are used in order. `inflight`: the
    back-end notes what is in flight. `logged`: and which pages it writes. `rings`: as they were
    started. Raises PeerError where the peer refuses, OSError where it is lost.
    """

    def __init__(
        self,
        path: Path,
        *,
        depth: int,
        block_size: int,
        queues: int = 1,
        features: int = RING_FEATURES,
        protocol: int = WANTED_PROTOCOL,
        inflight: bool = False,
        logged: bool = False,
    ) -> None:
        super().__init__(path)
        try:
            flush = 1 << lib.VIRTIO_BLK_F_FLUSH
            multi = 1 << lib.VIRTIO_BLK_F_MQ if queues > 1 else 0
            noting = 1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD if inflight else 0
            logging = 1 << lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD if logged else 0
            log_all = 1 << lib.VHOST_F_LOG_ALL if logged else 0
            self.negotiate(features | flush | multi | log_all, protocol | noting | logging)
            self.capacity = self._capacity()
            slots = 1 if self.has(lib.VIRTIO_F_INDIRECT_DESC) else 3
            queue_size = max(128, 1 << (slots * depth - 1).bit_length())
            room = depth * (_SLOT + block_size)
            self.share(queues * (room + 64 * queue_size + (1 << 16)))
            if inflight:
                region, fd = self.frontend.get_inflight(queues, queue_size)
                self.frontend.set_inflight(region, self.own(fd))
            if logged:
                self.log()
            self.rings = [self.start_ring(index, queue_size) for index in range(queues)]
            self._buffers = [self.place(room) for _ in self.rings]
            self.frontend.barrier()
        except BaseException:
            self.close()
            raise

    def _capacity(self) -> int:
        # Only the capacity: peers' config spaces differ in length, and refuse to be over-read.
        return int.from_bytes(self.frontend.get_config(0, CAPACITY_SIZE), "little") * 512

    def run(
        self,
        pattern: Pattern,
        *,
        seconds: float = 0,
        requests: int = 0,
        queue: int = 0,
        cpu: int = -1,
    ) -> Outcome:
        """Runs `pattern` for `seconds`, or for a number of `requests`, in this thread.

        Raises TimeoutError when the back-end stops answering, OSError when it breaks the ring.
        """
        ring = self.rings[queue]
        flags = (
            (lib.VHOST_LOAD_RANDOM if pattern.random else 0)
            | (lib.VHOST_LOAD_POLL if pattern.poll else 0)
            | (lib.VHOST_LOAD_VERIFY if pattern.verify else 0)
            | (lib.VHOST_LOAD_EVENT_IDX if self.has(lib.VIRTIO_F_EVENT_IDX) else 0)
            | (lib.VHOST_LOAD_INDIRECT if self.has(lib.VIRTIO_F_INDIRECT_DESC) else 0)
            | (lib.VHOST_LOAD_PACKED if self.has(lib.VIRTIO_F_RING_PACKED) else 0)
            | (lib.VHOST_LOAD_IN_ORDER if self.has(lib.VIRTIO_F_IN_ORDER) else 0)
        )
        with ffi.from_buffer(self.map) as memory:
            config = ffi.new(
                "struct vhost_load_config *",
                {
                    "memory": memory,
                    "memory_size": self.memory_size,
                    "desc": ring.desc,
                    "avail": ring.avail,
                    "used": ring.used,
                    "buffers": self._buffers[queue],
                    "start": pattern.start,
                    "span": pattern.span or self.capacity - pattern.start,
                    "requests": requests,
                    "duration_ns": int(seconds * 1e9),
                    "seed": pattern.seed,
                    "flags": flags,
                    "queue_size": ring.size,
                    "depth": pattern.depth,
                    "block_size": pattern.block_size,
                    "write_percent": pattern.write_percent,
                    "stall_ms": STALL_MS,
                    "kick_fd": ring.kick_fd,
                    "call_fd": ring.call_fd,
                    "cpu": cpu,
                },
            )
            result = ffi.new("struct vhost_load_result *")
            error = lib.vhost_driver_run(config, result)
        check(error, str(pattern), STALL_MS)
        return Outcome(
            requests=result.requests,
            bytes=result.bytes,
            errors=result.errors,
            corrupt=result.corrupt,
            kicks=result.kicks,
            sleeps=result.sleeps,
            seconds=result.elapsed_ns / 1e9,
            driver_cpu_seconds=result.cpu_ns / 1e9,
            latency=tuple(result.latency),
        )
