"""What a front-end has said so far, and whether what it says next is acceptable.

Theory of operation.  `Session.check` turns a framed message into a `Request`: known, offered,
of the right size, with the right number of descriptors, fitting the state.  It changes nothing.
Whoever acts on the request then calls `Session.commit`, and only then does the state move.  So a
message that is refused, or whose effect fails, leaves no trace (policy E).

Rule 1: no I/O here.  Memory regions and rings are numbers; mapping and serving are the backend's.
Rule 2: a ring has two independent properties, started and enabled.  It starts with its kick fd and
stops with GET_VRING_BASE; enabling only gates the service ("Ring states").

Source: vhost-user specification, "Starting and stopping rings" and "Front-end message types".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vdev._native import lib
from vdev.errors import NotSupported, PeerError
from vdev.memory import check_overlaps
from vdev.virtio.queue import F_RING_PACKED, first_index, index_bits
from vdev.virtio.vhost_user.codec import Message
from vdev.virtio.vhost_user.iotlb import Iotlb
from vdev.virtio.vhost_user.layout import (
    F_LOG_USED,
    Placement,
    check_inflight,
    check_inflight_wanted,
    check_log,
    check_logged,
    check_parts,
    check_region,
    check_size,
    place_ring,
)
from vdev.virtio.vhost_user.payloads import (
    ConfigAccess,
    Inflight,
    IotlbMessage,
    Log,
    MemoryRegion,
    TransferState,
    VringAddr,
    VringState,
)
from vdev.virtio.vhost_user.ring import Ring, VringFd
from vdev.virtio.vhost_user.status import check_status
from vdev.virtio.vhost_user.table import TABLE, Needs, Row

F_ACCESS_PLATFORM: int = 1 << lib.VIRTIO_F_ACCESS_PLATFORM
F_LOG_ALL: int = 1 << lib.VHOST_F_LOG_ALL
F_PROTOCOL: int = 1 << lib.VHOST_USER_F_PROTOCOL_FEATURES
F_VERSION_1: int = 1 << lib.VIRTIO_F_VERSION_1
F_OURS: int = F_ACCESS_PLATFORM | F_LOG_ALL | F_PROTOCOL
"""Features that are not the device's business."""
MEM_SLOTS: int = lib.VHOST_USER_MEM_SLOTS

_INDEX_MASK: int = lib.VHOST_USER_VRING_INDEX_MASK
_LOG_SHMFD: int = lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD
_F_BASE_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT
_F_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_FOR_IOMMU: int = (
    1 << lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ | 1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK
)
_NOFD: int = lib.VHOST_USER_VRING_NOFD
_CONFIG_FLAGS = (0, 1)  # VHOST_SET_CONFIG_TYPE_FRONTEND, _MIGRATION


class Request(NamedTuple):
    """A checked message: its row and its decoded payload."""

    row: Row
    body: Any


class Session:
    """The state of one connection.

    features: the device's.  protocol_features: those offered.  num_queues: rings of the device.
    config_size: bytes of its configuration space.
    """

    def __init__(
        self, *, features: int, protocol_features: int, num_queues: int, config_size: int
    ) -> None:
        self.offered = features | F_PROTOCOL
        if protocol_features >> _LOG_SHMFD & 1:
            self.offered |= F_LOG_ALL
        self.offered_protocol = protocol_features
        self.config_size = config_size
        self.owned = False
        self.features: int | None = None
        self.protocol_features: int | None = None
        self.status = 0
        self.regions: tuple[MemoryRegion, ...] = ()
        self.iotlb = Iotlb()
        self.log: Log | None = None
        self.inflight: Inflight | None = None
        self.rings = [Ring(index) for index in range(num_queues)]

    def has_protocol(self, bit: int) -> bool:
        """Whether the protocol feature was agreed."""
        return bool((self.protocol_features or 0) >> bit & 1)

    @property
    def packed(self) -> bool:
        """Whether the rings are packed."""
        return bool((self.features or 0) & F_RING_PACKED)

    @property
    def translated(self) -> bool:
        """Whether the addresses of rings and buffers are IOVAs."""
        return bool((self.features or 0) & F_ACCESS_PLATFORM)

    def base(self, index: int) -> int:
        """Where ring `index` goes on."""
        base = self.rings[index].base
        return first_index(self.features or 0) if base is None else base

    @property
    def protocol_agreed(self) -> bool:
        """Whether the front-end knows protocol features.

        They may be set before the virtio features, and QEMU enables rings of a net device in
        between; later the virtio feature bit decides.
        """
        if self.features is None:
            return self.protocol_features is not None
        return bool(self.features & F_PROTOCOL)

    def check(self, message: Message) -> Request:
        """Raises PeerError where the message is not acceptable now; changes nothing."""
        row = TABLE.get(message.request)
        if row is None:
            raise NotSupported(f"request {message.request}: unknown")
        try:
            return Request(row, self._check(row, message))
        except NotSupported as error:
            raise NotSupported(f"{row.name}: {error}") from None
        except PeerError as error:
            raise PeerError(f"{row.name}: {error}") from None

    def commit(self, request: Request) -> None:
        """The request was carried out: the state moves."""
        if handler := _COMMITS.get(request.row.handler):
            handler(self, request.body)

    def _check(self, row: Row, message: Message) -> Any:
        if row.refusal is not None:
            raise NotSupported(row.refusal)
        bit = row.protocol_feature
        if bit is not None and not self.has_protocol(bit):
            raise NotSupported(f"protocol feature {bit} was not agreed")
        fewest, most = row.fds
        if not fewest <= len(message.fds) <= most:
            raise PeerError(
                f"{len(message.fds)} file descriptors, expected "
                f"{fewest if fewest == most else f'{fewest} to {most}'}"
            )
        body = row.payload.decode(message.payload)
        self._check_needs(row.needs, message, body)
        if handler := _CHECKS.get(row.handler):
            body = handler(self, body, len(message.fds))
        return body

    def _check_needs(self, needs: Needs, message: Message, body: Any) -> None:
        if needs & Needs.NO_OWNER and self.owned:
            raise PeerError("the session has an owner already")
        if needs & Needs.PROTOCOL and not self.protocol_agreed:
            raise PeerError("VHOST_USER_F_PROTOCOL_FEATURES was not agreed")
        if needs & Needs.FEATURES and self.features is None:
            raise PeerError("SET_FEATURES must come before")
        if needs & Needs.MEMORY and not self.regions:
            raise PeerError("the memory table must come before")
        if needs & Needs.IOMMU and not self.translated:
            raise PeerError("VIRTIO_F_ACCESS_PLATFORM was not accepted")
        if needs & Needs.RING_READY:
            ring = self._ring(body & _INDEX_MASK)
            if not ring.size or ring.addresses is None:
                raise PeerError(f"size and addresses of ring {ring.index} must come before")

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise PeerError(f"ring {index}, but the device has {len(self.rings)}")
        return self.rings[index]

    # What is particular to a message: the checks, and below them the moves of the state.

    def check_set_features(self, body: int, _fds: int) -> int:
        if extra := body & ~self.offered:
            raise PeerError(f"features {extra:#x} were not offered")
        # virtio 1.3, section 6.2: a device may refuse a driver that does not accept VERSION_1,
        # and ours speak no legacy layout.
        if self.offered & F_VERSION_1 and not body & F_VERSION_1:
            raise PeerError("VIRTIO_F_VERSION_1 was not accepted, and there is no legacy device")
        changed = 0 if self.features is None else body ^ self.features
        if changed & ~F_LOG_ALL and self._running():
            raise PeerError("features other than LOG_ALL cannot change while rings run")
        if body & F_ACCESS_PLATFORM and ~(self.protocol_features or 0) & _FOR_IOMMU:
            raise PeerError("VIRTIO_F_ACCESS_PLATFORM goes with BACKEND_REQ and REPLY_ACK only")
        if body & F_LOG_ALL and self.log is not None:
            packed = bool(body & F_RING_PACKED)
            check_logged(self.log, self.regions, self._ring_addresses(), packed=packed)
        return body

    def check_set_log_base(self, body: Log, _fds: int) -> Log:
        check_log(body)
        check_logged(body, self.regions, self._ring_addresses(), packed=self.packed)
        return body

    def check_get_inflight_fd(self, body: Inflight, _fds: int) -> Inflight:
        check_inflight_wanted(body, len(self.rings))
        return body

    def check_set_inflight_fd(self, body: Inflight, _fds: int) -> Inflight:
        check_inflight(body, len(self.rings), packed=self.packed)
        if self._running():
            raise PeerError("the in-flight region cannot change while rings run")
        return body

    def check_set_protocol_features(self, body: int, _fds: int) -> int:
        if extra := body & ~self.offered_protocol:
            raise PeerError(f"protocol features {extra:#x} were not offered")
        if body >> _F_BASE_INFLIGHT & 1 and not body >> _F_INFLIGHT & 1:
            raise PeerError("GET_VRING_BASE_INFLIGHT goes with INFLIGHT_SHMFD only")
        return body

    def check_set_mem_table(
        self, body: tuple[MemoryRegion, ...], fds: int
    ) -> tuple[MemoryRegion, ...]:
        if fds != len(body):
            raise PeerError(f"{fds} file descriptors for {len(body)} memory regions")
        for region in body:
            check_region(region)
        check_overlaps(body)
        self._check_logging(body)
        return body

    def check_add_mem_reg(self, body: MemoryRegion, _fds: int) -> MemoryRegion:
        if len(self.regions) >= MEM_SLOTS:
            raise PeerError(f"all {MEM_SLOTS} memory slots are taken")
        check_region(body)
        check_overlaps((*self.regions, body))
        self._check_logging((body,))
        return body

    def check_rem_mem_reg(self, body: MemoryRegion, _fds: int) -> MemoryRegion:
        """The region with the same addresses and size; the offset does not count."""
        for region in self.regions:
            if region[:3] == body[:3]:
                return region
        raise PeerError(
            f"no memory region of {body.size:#x} bytes at guest address {body.guest_addr:#x}, "
            f"user address {body.user_addr:#x}"
        )

    def check_set_vring_num(self, body: VringState, _fds: int) -> VringState:
        ring = self._ring(body.ring)
        check_size(body.num, packed=self.packed)
        if ring.started and body.num != ring.size:
            raise PeerError(f"the size of ring {ring.index} cannot change while it runs")
        return body

    def check_set_vring_addr(self, body: VringAddr, _fds: int) -> VringAddr:
        ring = self._ring(body.ring)
        if extra := body.flags & ~F_LOG_USED:
            raise PeerError(f"ring flags {extra:#x} are unknown")
        placement = self._place(body, ring.size or 1)
        # A running ring may be told its addresses again, to switch logging of the used ring.
        if ring.started and placement != ring.placement:
            raise PeerError(f"the addresses of ring {ring.index} cannot change while it runs")
        if not self.translated:
            self._check_logging((), ((body, ring.size or 1),))
        return body

    def check_set_vring_base(self, body: VringState, _fds: int) -> VringState:
        ring = self._ring(body.ring)
        if body.num >> (bits := index_bits(self.features or 0)):
            kind = "packed" if self.packed else "split"
            raise PeerError(f"ring base {body.num:#x}, at most {bits} bits for a {kind} ring")
        if ring.started:
            raise PeerError(f"the base of ring {ring.index} cannot change while it runs")
        return body

    def check_get_vring_base(self, body: VringState, _fds: int) -> VringState:
        self._ring(body.ring)
        return body

    def check_set_vring_enable(self, body: VringState, _fds: int) -> VringState:
        self._ring(body.ring)
        if body.num not in (0, 1):
            raise PeerError(f"ring state {body.num}, expected 0 or 1")
        return body

    def check_vring_fd(self, body: int, fds: int) -> VringFd:
        if extra := body & ~(_INDEX_MASK | _NOFD):
            raise PeerError(f"bits {extra:#x} of the ring index are reserved")
        ring = self._ring(body & _INDEX_MASK)
        has_fd = not body & _NOFD
        if has_fd != bool(fds):
            raise PeerError(
                f"{fds} file descriptors where the index says {'one' if has_fd else 'none'}"
            )
        return VringFd(ring.index, has_fd)

    check_set_vring_call = check_vring_fd
    check_set_vring_err = check_vring_fd

    def check_set_vring_kick(self, body: int, fds: int) -> VringFd:
        checked = self.check_vring_fd(body, fds)
        self.place(checked.ring)
        ring, inflight = self.rings[checked.ring], self.inflight
        if inflight is not None and ring.size > inflight.queue_size:
            raise PeerError(
                f"ring {ring.index} of {ring.size} entries, but the in-flight region is for queues "
                f"of {inflight.queue_size}"
            )
        self._check_logging((), self._ring_addresses())
        return checked

    def _ring_addresses(self) -> list[tuple[VringAddr, int]]:
        """Of rings that say themselves where they are logged."""
        if self.translated:
            return []
        return [(ring.addresses, ring.size) for ring in self.rings if ring.addresses is not None]

    @property
    def logging(self) -> bool:
        """Whether what is written to guest memory is to be logged, and there is a log."""
        return self.log is not None and bool((self.features or 0) & F_LOG_ALL)

    def _check_logging(
        self, regions: tuple[MemoryRegion, ...], rings: Iterable[tuple[VringAddr, int]] = ()
    ) -> None:
        if self.logging:
            assert self.log is not None
            check_logged(self.log, regions, rings, packed=self.packed)

    def place(self, index: int) -> Placement:
        """Where ring `index` lies now; it must overlap no running one. Raises PeerError."""
        ring = self._ring(index)
        assert ring.addresses is not None
        check_size(ring.size, packed=self.packed)
        placement = self._place(ring.addresses, ring.size)
        others = (r.placement for r in self.rings if r is not ring and r.placement)
        check_parts([*placement, *(part for other in others for part in other)])
        return placement

    def _place(self, addresses: VringAddr, size: int) -> Placement:
        regions = None if self.translated else self.regions
        return place_ring(regions, addresses, size, packed=self.packed)

    def check_iotlb_msg(self, body: IotlbMessage, _fds: int) -> Iotlb:
        return self.iotlb.after(body, self.regions)

    def check_net_set_mtu(self, body: int, _fds: int) -> int:
        low, high = lib.VIRTIO_NET_MTU_MIN, lib.VIRTIO_NET_MTU_MAX
        if not low <= body <= high:
            raise PeerError(f"MTU {body}, expected {low} to {high}")
        return body

    def check_get_config(self, body: ConfigAccess, _fds: int) -> ConfigAccess:
        if body.flags not in _CONFIG_FLAGS:
            raise PeerError(f"flags {body.flags:#x}, expected one of {_CONFIG_FLAGS}")
        if body.size == 0 or body.offset + body.size > self.config_size:
            raise PeerError(
                f"{body.size} bytes at {body.offset} of a configuration space of "
                f"{self.config_size} bytes"
            )
        return body

    check_set_config = check_get_config

    def check_set_status(self, body: int, _fds: int) -> int:
        check_status(self.status, body)
        return body

    def check_set_device_state_fd(self, body: TransferState, _fds: int) -> TransferState:
        if body.direction not in (lib.VHOST_USER_TRANSFER_SAVE, lib.VHOST_USER_TRANSFER_LOAD):
            raise PeerError(f"direction {body.direction} is unknown")
        if body.phase != lib.VHOST_USER_TRANSFER_STOPPED:
            raise PeerError(f"phase {body.phase} is unknown")
        if self._running():
            raise PeerError("the device has no state to transfer while rings run")
        return body

    def commit_set_owner(self, _body: None) -> None:
        self.owned = True

    def commit_reset_owner(self, _body: None) -> None:
        """No longer defined; "disables all rings" is what back-ends agree on."""
        self.owned = False
        for ring in self.rings:
            ring.enabled = False

    def commit_set_features(self, body: int) -> None:
        self.features = body
        self._forget_translations()
        if not body & F_PROTOCOL:
            # "the ring starts directly in the enabled state"
            for ring in self.rings:
                ring.enabled = True

    def commit_set_log_base(self, body: Log) -> None:
        self.log = body

    def commit_set_inflight_fd(self, body: Inflight) -> None:
        self.inflight = body

    def commit_set_protocol_features(self, body: int) -> None:
        self.protocol_features = body

    def commit_set_mem_table(self, body: tuple[MemoryRegion, ...]) -> None:
        self._set_regions(body)

    def commit_add_mem_reg(self, body: MemoryRegion) -> None:
        self._set_regions((*self.regions, body))

    def commit_rem_mem_reg(self, body: MemoryRegion) -> None:
        self._set_regions(tuple(region for region in self.regions if region is not body))

    def _set_regions(self, regions: tuple[MemoryRegion, ...]) -> None:
        """A ring that is no longer in memory has broken: it stays where it was until it stops."""
        self.regions = regions
        self.iotlb = self.iotlb.moved(regions)
        for ring in self.rings:
            if ring.started and ring.addresses is not None:
                with contextlib.suppress(PeerError):
                    ring.placement = self._place(ring.addresses, ring.size)

    def commit_set_vring_num(self, body: VringState) -> None:
        self.rings[body.ring].size = body.num

    def commit_set_vring_addr(self, body: VringAddr) -> None:
        self.rings[body.ring].addresses = body

    def commit_set_vring_base(self, body: VringState) -> None:
        self.rings[body.ring].base = body.num

    def commit_get_vring_base(self, body: VringState) -> None:
        self.rings[body.ring].placement = None
        self._forget_translations()

    def commit_iotlb_msg(self, body: Iotlb) -> None:
        self.iotlb = body

    def _forget_translations(self) -> None:
        """While no ring runs a front-end like QEMU takes nothing back."""
        if not self._running():
            self.iotlb = Iotlb()

    def commit_set_vring_kick(self, body: VringFd) -> None:
        self.rings[body.ring].placement = self.place(body.ring)

    def commit_set_vring_enable(self, body: VringState) -> None:
        self.rings[body.ring].enabled = bool(body.num)

    def commit_set_status(self, body: int) -> None:
        if body == 0:
            # QEMU clears the status when its guest is paused and asks for the bases afterwards.
            bases = [ring.base for ring in self.rings]
            self.commit_reset_device(None)
            for ring, base in zip(self.rings, bases, strict=True):
                ring.base = base
        self.status = body

    def commit_reset_device(self, _body: None) -> None:
        """All as after connecting, but for what the front-end does not say again.

        It keeps ownership and protocol features, and QEMU sends only changes of the memory.
        """
        self.status = 0
        self.features = None
        self.iotlb = Iotlb()
        self.inflight = None
        self.rings = [Ring(ring.index) for ring in self.rings]

    def _running(self) -> bool:
        return any(ring.started for ring in self.rings)


_CHECKS: dict[str, Callable[..., Any]] = {}
_COMMITS: dict[str, Callable[..., None]] = {}
for _row in TABLE.values():
    if _check := getattr(Session, f"check_{_row.handler}", None):
        _CHECKS[_row.handler] = _check
    if _commit := getattr(Session, f"commit_{_row.handler}", None):
        _COMMITS[_row.handler] = _commit
