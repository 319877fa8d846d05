"""A vhost-user front-end session that behaves: the order of messages QEMU uses, every answer
checked.  `wire` lies beneath for whoever wants to misbehave in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

from . import wire
from .log import DirtyLog
from .memory import GuestMemory, Region
from .packed import PackedRing
from .ring import Ring
from .wire import NEED_REPLY, VERSION, Protocol, Request, Wire, u64, vring_addr, vring_state

F_LOG_ALL = 1 << 26
F_LOG_USED = 1  # VHOST_VRING_F_LOG, a flag of ring addresses
F_ANY_LAYOUT = 1 << 27
F_INDIRECT = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

PROTOCOL_WANTED = (
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.MTU
    | Protocol.BACKEND_REQ
    | Protocol.CONFIG
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
    | Protocol.STATUS
)

STATUS_ACKNOWLEDGE = 1
STATUS_DRIVER = 2
STATUS_DRIVER_OK = 4
STATUS_FEATURES_OK = 8


class Refused(Exception):
    """The server acknowledged a message with an error."""

    def __init__(self, request: int, value: int) -> None:
        super().__init__(f"{Request(request).name} refused: {value:#x}")
        self.value = value


class Session:
    """One connection.  Methods are named after the messages they send."""

    def __init__(self, connection: Wire | str | os.PathLike[str]) -> None:
        self.wire = connection if isinstance(connection, Wire) else Wire.connect(connection)
        self.features = 0
        self.protocol = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.wire.close()

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without a reply of its own: acknowledged where that was negotiated.
        Raises Refused."""
        if self.protocol & Protocol.REPLY_ACK:
            value = self.wire.ack_of(request, payload, fds)
            if value:
                raise Refused(request, value)
        else:
            self.wire.send(request, payload, fds)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        reply = self.wire.ask(request, payload)
        assert not reply.fds, f"{Request(request).name} answered with fds"
        return reply.payload

    # ---- negotiation ----

    def get_features(self) -> int:
        return self.wire.ask(Request.GET_FEATURES).u64

    def get_protocol_features(self) -> int:
        return self.wire.ask(Request.GET_PROTOCOL_FEATURES).u64

    def set_features(self, features: int) -> None:
        self.do(Request.SET_FEATURES, u64(features))
        self.features = features

    def set_protocol_features(self, features: int) -> None:
        self.wire.send(Request.SET_PROTOCOL_FEATURES, u64(features))
        self.protocol = features

    def negotiate(self, features: int, *, protocol: int = PROTOCOL_WANTED) -> None:
        """Own the device and accept what is offered of `features` and `protocol`."""
        offered = self.get_features()
        self.do(Request.SET_OWNER)
        if offered & features & F_PROTOCOL_FEATURES:
            self.set_protocol_features(self.get_protocol_features() & protocol)
        self.set_features(offered & features)

    def get_queue_num(self) -> int:
        return self.wire.ask(Request.GET_QUEUE_NUM).u64

    # ---- memory ----

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        self.do(
            Request.SET_MEM_TABLE,
            wire.mem_table(r.pack() for r in regions),
            [r.fd for r in regions],
        )

    def get_max_mem_slots(self) -> int:
        return self.wire.ask(Request.GET_MAX_MEM_SLOTS).u64

    def add_mem_reg(self, region: Region) -> None:
        self.do(Request.ADD_MEM_REG, wire.single_region(region.pack()), [region.fd])

    def rem_mem_reg(self, region: Region) -> None:
        self.do(Request.REM_MEM_REG, wire.single_region(region.pack()))

    def share(self, memory: GuestMemory, *, slots: bool = False) -> None:
        """Give the server all of `memory`: as one table, or region by region into slots."""
        if slots:
            for region in memory.regions:
                self.add_mem_reg(region)
        else:
            self.set_mem_table(memory.regions)

    # ---- the dirty log ----

    def set_log_base(self, log: DirtyLog) -> None:
        assert self.wire.ask(Request.SET_LOG_BASE, log.pack(), [log.fd]).u64 == 0

    def start_logging(self, log: DirtyLog, rings: Sequence[Ring]) -> None:
        """In QEMU's order: the log, LOG_ALL, and the rings' addresses once more."""
        self.set_log_base(log)
        self.set_features(self.features | F_LOG_ALL)
        for index, ring in enumerate(rings):
            self.set_vring_addr(index, ring, log=ring.used)

    def stop_logging(self, rings: Sequence[Ring]) -> None:
        self.set_features(self.features & ~F_LOG_ALL)
        for index, ring in enumerate(rings):
            self.set_vring_addr(index, ring)

    # ---- in-flight tracking ----

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> tuple[bytes, int]:
        """What describes the region that the server made, and its file, which is the caller's."""
        asked = wire.INFLIGHT.pack(0, 0, num_queues, queue_size)
        reply = self.wire.ask(Request.GET_INFLIGHT_FD, asked)
        (fd,) = reply.fds
        return reply.payload, fd

    def set_inflight_fd(self, description: bytes, fd: int) -> None:
        self.do(Request.SET_INFLIGHT_FD, description, [fd])

    # ---- the device's state ----

    def set_device_state_fd(self, direction: int, fd: int, *, phase: int = 0) -> int:
        """Bits 0-7: an error; bit 8: no descriptor comes along."""
        asked = wire.VRING_STATE.pack(direction, phase)
        return self.wire.ask(Request.SET_DEVICE_STATE_FD, asked, [fd]).u64

    def check_device_state(self) -> int:
        """0, or an error."""
        return self.wire.ask(Request.CHECK_DEVICE_STATE).u64

    # ---- rings ----

    def configure_ring(self, index: int, ring: Ring, *, base: int = 0) -> None:
        """Everything but kick and enable: the ring stays stopped."""
        self.do(Request.SET_VRING_NUM, vring_state(index, ring.size))
        start = ring.base if isinstance(ring, PackedRing) and not base else base
        self.do(Request.SET_VRING_BASE, vring_state(index, start))
        self.set_vring_addr(index, ring)
        self.do(Request.SET_VRING_ERR, u64(index), [ring.err_fd])
        self.do(Request.SET_VRING_CALL, u64(index), [ring.call_fd])

    def set_vring_addr(self, index: int, ring: Ring, *, log: int | None = None) -> None:
        """log: the guest address at which the used ring is to be logged."""
        user = ring.memory.user_addr
        flags = 0 if log is None else F_LOG_USED
        self.do(
            Request.SET_VRING_ADDR,
            vring_addr(
                index, user(ring.desc), user(ring.used), user(ring.avail), log=log or 0, flags=flags
            ),
        )

    def set_vring_kick(self, index: int, ring: Ring) -> None:
        self.do(Request.SET_VRING_KICK, u64(index), [ring.kick_fd])

    def set_vring_call(self, index: int, fd: int) -> None:
        self.do(Request.SET_VRING_CALL, u64(index), [fd])

    def enable(self, index: int, on: bool = True) -> None:
        self.do(Request.SET_VRING_ENABLE, vring_state(index, int(on)))

    def start_ring(self, index: int, ring: Ring, *, base: int = 0, enable: bool = True) -> None:
        self.configure_ring(index, ring, base=base)
        self.set_vring_kick(index, ring)
        if enable and self.features & F_PROTOCOL_FEATURES:
            self.enable(index)

    def get_vring_base(self, index: int) -> int:
        """Stop the ring; returns the next index."""
        reply = self.ask(Request.GET_VRING_BASE, vring_state(index, 0))
        got, base = wire.VRING_STATE.unpack(reply)
        assert got == index, f"base of ring {got}, asked {index}"
        return int(base)

    # ---- device ----

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the config space; b"" is the server's refusal."""
        reply = self.ask(Request.GET_CONFIG, wire.config(offset, bytes(size)))
        if not reply:
            return b""
        got_offset, got_size, _ = wire.CONFIG.unpack_from(reply)
        data = reply[wire.CONFIG.size :]
        if got_size == 0:
            return b""
        assert (got_offset, got_size, len(data)) == (offset, size, size), "config reply framing"
        return data

    def set_config(self, offset: int, data: bytes) -> None:
        self.do(Request.SET_CONFIG, wire.config(offset, data))

    def get_status(self) -> int:
        return self.wire.ask(Request.GET_STATUS).u64

    def set_status(self, status: int) -> None:
        self.do(Request.SET_STATUS, u64(status))

    def driver_ok(self) -> None:
        """Walk the status bits as a driver does (virtio 1.3, section 3.1.1)."""
        if self.protocol & Protocol.STATUS:
            status = 0
            for bit in (
                STATUS_ACKNOWLEDGE,
                STATUS_DRIVER,
                STATUS_FEATURES_OK,
                STATUS_DRIVER_OK,
            ):
                status |= bit
                self.set_status(status)

    def barrier(self) -> None:
        """Return when the server has handled everything sent so far."""
        self.get_features()

    def send_flagged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send with NEED_REPLY without waiting for the acknowledgement."""
        self.wire.send(request, payload, fds, flags=VERSION | NEED_REPLY)
