"""The front-end's side of a connection: what a VMM says to a back-end.

Theory of operation.  Each message that has a reply, or an ack where REPLY_ACK was agreed, is
waited for (`Exchange`), so a refusal is told to whom it concerns, and leaves the connection as it
was.  All of it blocks: callers that live in an event loop use a thread.

Rule 1: nothing is said that was not agreed on; what the back-end lacks is told as NotSupported.
Rule 2: descriptors stay the caller's; those that a back-end sends unasked are closed by the kernel.

Source: vhost-user specification, "Communication" and "Front-end message types".
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

from vdev._native import lib
from vdev.errors import NotSupported, PeerError
from vdev.virtio.queue import QueueConfig, index_bits
from vdev.virtio.vhost_user.channel import close_fds
from vdev.virtio.vhost_user.codec import encode
from vdev.virtio.vhost_user.exchange import Exchange
from vdev.virtio.vhost_user.layout import F_LOG_USED, check_size, place_ring
from vdev.virtio.vhost_user.payloads import (
    CONFIG,
    INFLIGHT,
    LOG,
    MEMORY_TABLE,
    SINGLE_REGION,
    TRANSFER_STATE,
    U64,
    VRING_ADDR,
    VRING_STATE,
    ConfigAccess,
    Inflight,
    Log,
    MemoryRegion,
    TransferState,
    VringAddr,
    VringState,
)

ANSWER_SECONDS = 20.0
F_PROTOCOL: int = 1 << lib.VHOST_USER_F_PROTOCOL_FEATURES
MAX_CONFIG: int = lib.VHOST_USER_CONFIG_MAX

_RETRY_SECONDS = 0.0005
_MOST_STATE = 1 << 26  # bytes of a back-end's state
_PIECE = 1 << 16
_TABLE_SIZE: int = lib.VHOST_USER_MEM_REGIONS
_F_MQ: int = lib.VHOST_USER_PROTOCOL_F_MQ
_F_REPLY_ACK: int = lib.VHOST_USER_PROTOCOL_F_REPLY_ACK
_F_BACKEND_REQ: int = lib.VHOST_USER_PROTOCOL_F_BACKEND_REQ
_F_CONFIG: int = lib.VHOST_USER_PROTOCOL_F_CONFIG
_F_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_F_RESET_DEVICE: int = lib.VHOST_USER_PROTOCOL_F_RESET_DEVICE
_F_DEVICE_STATE: int = lib.VHOST_USER_PROTOCOL_F_DEVICE_STATE
_F_MEM_SLOTS: int = lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
_F_LOG: int = lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD
_F_STATUS: int = lib.VHOST_USER_PROTOCOL_F_STATUS


class SharedRegion(NamedTuple):
    """Guest memory for a back-end to map: `size` bytes from `offset` of the file `fd`.

    user_addr: where rings in it are said to be; any address that no other region has.
    """

    guest_addr: int
    size: int
    user_addr: int
    offset: int
    fd: int

    @property
    def payload(self) -> MemoryRegion:
        return MemoryRegion(self.guest_addr, self.size, self.user_addr, self.offset)


class Frontend(Exchange):
    """A connection to a back-end.  A context manager; `close` ends it.

    All methods raise PeerError where the back-end refuses, or breaks the protocol; OSError where
    the connection fails, TimeoutError among them where an answer takes more than `answer_seconds`.

    sock: the connection, to be watched for its end while nothing is being asked.
    offered: the features that the back-end offers, F_PROTOCOL_FEATURES included.
    features, protocol_features: those agreed on.
    failed: why the connection is of no more use, or None.
    ended: it failed because the back-end ended it, as one does that was killed.
    """

    def __init__(self, sock: socket.socket, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """Takes over a connected stream socket, and asks for the back-end's features."""
        super().__init__(sock, answer_seconds=answer_seconds)
        self._regions: tuple[SharedRegion, ...] = ()
        self.features = 0
        try:
            self.offered: int = self.ask(lib.VHOST_USER_GET_FEATURES)
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        answer_seconds: float = ANSWER_SECONDS,
        patience: float = 0,
    ) -> Self:
        """Connects to the back-end that listens on `path`.

        One that serves a single front-end may hang up on the next until it has seen the last one
        leave: it is tried again for `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(answer_seconds)
                sock.connect(os.fspath(path))
                return cls(sock, answer_seconds=answer_seconds)
            except (ConnectionResetError, BrokenPipeError):
                sock.close()
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
            except BaseException:
                sock.close()
                raise

    def adopt(self, sock: socket.socket) -> None:
        """Goes over to a connection to the next back-end, to which nothing has been said yet."""
        self.sock.close()
        self.sock = sock
        self._regions = ()
        self.features = self.protocol_features = 0
        self.failed = None
        self.ended = False
        self.offered = self.ask(lib.VHOST_USER_GET_FEATURES)

    # Messages

    def barrier(self) -> None:
        """Returns once the back-end has acted on all that was sent."""
        self.ask(lib.VHOST_USER_GET_FEATURES)

    # Negotiation

    def negotiate_protocol(self, wanted: int) -> int:
        """Takes what the back-end offers of the protocol features `wanted`, and REPLY_ACK.

        Once a connection, before anything else; returns what was taken.
        """
        self.tell(lib.VHOST_USER_SET_OWNER)
        if self.offered & F_PROTOCOL:
            offered = self.offered_protocol()
            taken = offered & (wanted | 1 << _F_REPLY_ACK)
            self.tell(lib.VHOST_USER_SET_PROTOCOL_FEATURES, U64.encode(taken))
            self.protocol_features = taken
        return self.protocol_features

    def offered_protocol(self) -> int:
        """The protocol features that the back-end offers."""
        return int(self.ask(lib.VHOST_USER_GET_PROTOCOL_FEATURES))

    def set_features(self, features: int) -> None:
        """Accepts virtio features, of those offered; no ring runs."""
        features |= self.offered & F_PROTOCOL
        if extra := features & ~self.offered:
            raise NotSupported(f"the back-end does not offer the features {extra:#x}")
        self.tell(lib.VHOST_USER_SET_FEATURES, U64.encode(features))
        self.features = features

    def has(self, feature: int) -> bool:
        """Whether a feature bit was agreed."""
        return bool(self.features >> feature & 1)

    def queue_num(self) -> int | None:
        """How many queues the back-end can have (of net, some count pairs); None = not told."""
        return int(self.ask(lib.VHOST_USER_GET_QUEUE_NUM)) if self.has_protocol(_F_MQ) else None

    # The device

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the configuration space; at most MAX_CONFIG."""
        self._needs(_F_CONFIG, "has no configuration space")
        request = lib.VHOST_USER_GET_CONFIG
        question = CONFIG.encode(ConfigAccess(offset, size, 0, bytes(size)))
        with self._exchange(request) as deadline:
            self._send(encode(request, question), (), deadline)
            payload = self._reply(request, CONFIG, deadline, may_be_empty=True)
            answer = CONFIG.decode(payload) if payload else None
            if (
                answer is not None
                and answer.size
                and (answer.offset, answer.size) != (offset, size)
            ):
                raise PeerError(
                    f"{answer.size} bytes at {answer.offset} of the configuration space, asked "
                    f"for {size} at {offset}"
                )
        if answer is None or not answer.size:
            raise PeerError(
                f"the back-end refused to tell {size} bytes at {offset} of its configuration space"
            )
        return bytes(answer.data)

    def set_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space."""
        self._needs(_F_CONFIG, "has no configuration space")
        access = ConfigAccess(offset, len(data), 0, data)
        self.tell(lib.VHOST_USER_SET_CONFIG, CONFIG.encode(access))

    def set_status(self, status: int) -> None:
        """The device status (virtio 1.3, section 2.1), 0 = reset; needs STATUS."""
        self._needs(_F_STATUS, "knows no device status")
        self.tell(lib.VHOST_USER_SET_STATUS, U64.encode(status))

    def get_status(self) -> int:
        """The device status; needs STATUS."""
        self._needs(_F_STATUS, "knows no device status")
        return int(self.ask(lib.VHOST_USER_GET_STATUS))

    def reset_device(self) -> bool:
        """Has the device forget its driver; false where the back-end has no way to."""
        if self.has_protocol(_F_STATUS):
            self.set_status(0)
        elif self.has_protocol(_F_RESET_DEVICE):
            self.tell(lib.VHOST_USER_RESET_DEVICE)
        else:
            return False
        return True

    def open_channel(self) -> socket.socket:
        """The socket on which the back-end speaks unasked, the caller's; needs BACKEND_REQ."""
        self._needs(_F_BACKEND_REQ, "has no channel of its own")
        ours, theirs = socket.socketpair()
        try:
            self.tell(lib.VHOST_USER_SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    # Guest memory

    def set_memory(self, regions: Sequence[SharedRegion]) -> None:
        """Gives the back-end all of the guest's memory, in place of what it had.

        As one table where that holds it; one by one where there are more regions, or more of them
        than before, and the back-end has memory slots.
        """
        slotted = self.has_protocol(_F_MEM_SLOTS)
        grows = bool(self._regions) and set(self._regions) <= set(regions)
        if slotted and (grows or len(regions) > _TABLE_SIZE):
            self._set_slots(regions)
            return
        if len(regions) > _TABLE_SIZE:
            raise NotSupported(
                f"{len(regions)} memory regions: the back-end has no memory slots, and takes "
                f"{_TABLE_SIZE}"
            )
        table = MEMORY_TABLE.encode(tuple(region.payload for region in regions))
        self.tell(lib.VHOST_USER_SET_MEM_TABLE, table, [region.fd for region in regions])
        self._regions = tuple(regions)

    def _set_slots(self, regions: Sequence[SharedRegion]) -> None:
        slots = self.ask(lib.VHOST_USER_GET_MAX_MEM_SLOTS)
        if len(regions) > slots:
            raise NotSupported(f"{len(regions)} memory regions: the back-end takes {slots}")
        for region in self._regions:
            if region not in regions:
                self.tell(lib.VHOST_USER_REM_MEM_REG, SINGLE_REGION.encode(region.payload))
                self._regions = tuple(r for r in self._regions if r is not region)
        for region in regions:
            if region not in self._regions:
                payload = SINGLE_REGION.encode(region.payload)
                self.tell(lib.VHOST_USER_ADD_MEM_REG, payload, [region.fd])
                self._regions = (*self._regions, region)

    # In-flight tracking

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[Inflight, int]:
        """A new region for so many queues of up to so many entries, and its file, the caller's."""
        self._needs(_F_INFLIGHT, "does not note what is in flight")
        request = lib.VHOST_USER_GET_INFLIGHT_FD
        question = INFLIGHT.encode(Inflight(0, 0, num_queues, queue_size))
        fds: list[int] = []
        try:
            with self._exchange(request) as deadline:
                self._send(encode(request, question), (), deadline)
                answer = INFLIGHT.decode(self._reply(request, INFLIGHT, deadline, fds=fds))
                if len(fds) != 1 or answer[2:] != (num_queues, queue_size) or not answer.mmap_size:
                    raise PeerError(f"{answer} with {len(fds)} file descriptors")
        except BaseException:
            close_fds(fds)
            raise
        return answer, fds[0]

    def set_inflight(self, region: Inflight, fd: int) -> None:
        """What is in flight stands there, or shall; before the first ring starts."""
        self._needs(_F_INFLIGHT, "does not note what is in flight")
        self.tell(lib.VHOST_USER_SET_INFLIGHT_FD, INFLIGHT.encode(region), [fd])

    # The dirty log

    def set_log(self, size: int, fd: int) -> None:
        """Where the back-end sets a bit for each page of 4 KiB that it writes: `size` bytes of the
        file `fd`, in place of the log before.

        It does so while VHOST_F_LOG_ALL is among the features, for used rings too where it was when
        they started.  Bit n % 8 of byte n / 8 is page n of guest memory.
        """
        self._needs(_F_LOG, "does not note what it writes")
        self.ask(lib.VHOST_USER_SET_LOG_BASE, LOG.encode(Log(size, 0)), fds=[fd])

    # The device's state

    def save_state(self) -> bytes:
        """What the back-end knows of the device and its driver, for `load_state` of the next one.

        No ring runs; the back-end may go on all the same.  Needs DEVICE_STATE.
        """
        state = b""
        with self._transferring(lib.VHOST_USER_TRANSFER_SAVE) as pieces:
            for fd in pieces:
                if not (piece := os.read(fd, _PIECE)):
                    break
                state += piece
                if len(state) > _MOST_STATE:
                    raise PeerError(f"the state of the device has more than {_MOST_STATE} bytes")
        self._check_state()
        return state

    def load_state(self, state: bytes) -> None:
        """Has the device go on from the state that another back-end saved; before a ring starts.

        Raises PeerError where the back-end cannot: then its device is as it was.
        """
        # One that knows better may end before it has read all: the check tells.
        with (
            self._transferring(lib.VHOST_USER_TRANSFER_LOAD) as pieces,
            suppress(BrokenPipeError),
        ):
            while state:
                state = state[os.write(next(pieces), state[:_PIECE]) :]
        self._check_state()

    @contextmanager
    def _transferring(self, direction: int) -> Iterator[Iterator[int]]:
        """Gives our end of the channel, again and again, each time when it is ready."""
        self._needs(_F_DEVICE_STATE, "does not transfer its state")
        request, save = lib.VHOST_USER_SET_DEVICE_STATE_FD, not direction
        reader, writer = os.pipe()
        fds = [reader, writer] if save else [writer, reader]  # ours, theirs
        try:
            question = TRANSFER_STATE.encode(
                TransferState(direction, lib.VHOST_USER_TRANSFER_STOPPED)
            )
            come: list[int] = []
            with self._exchange(request) as deadline:
                self._send(encode(request, question), fds[1:], deadline)
                answer = U64.decode(self._reply(request, U64, deadline, fds=come))
                fds = [*come, *fds]
                if len(come) != (not answer & lib.VHOST_USER_TRANSFER_NOFD):
                    raise PeerError(f"{answer:#x} with {len(come)} file descriptors")
            if answer & lib.VHOST_USER_TRANSFER_ERROR_MASK:
                raise PeerError(f"the back-end refused to transfer its state ({answer:#x})")
            close_fds(fds[1:])
            del fds[1:]
            os.set_blocking(fds[0], False)
            yield self._each_time_ready(fds[0], select.POLLIN if save else select.POLLOUT, deadline)
        finally:
            close_fds(fds)

    def _each_time_ready(self, fd: int, event: int, deadline: float) -> Iterator[int]:
        poller = select.poll()
        poller.register(fd, event)
        while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            yield fd
        raise TimeoutError(f"the state was not transferred in {self._answer_seconds:g} s")

    def _check_state(self) -> None:
        if value := self.ask(lib.VHOST_USER_CHECK_DEVICE_STATE):
            raise PeerError(f"the back-end did not transfer the device's state ({value:#x})")

    # Rings

    def start_ring(self, config: QueueConfig) -> None:
        """Starts a ring that lies in the memory given; its `features` do not count here.

        Raises PeerError where its size or addresses are wrong.
        """
        index, size = config.index, config.size
        packed = self.has(lib.VIRTIO_F_RING_PACKED)
        check_size(size, packed=packed)
        desc, avail, used = (
            self._user_address(guest) for guest in (config.desc, config.avail, config.used)
        )
        logged = (F_LOG_USED, config.used) if self.has(lib.VHOST_F_LOG_ALL) else (0, 0)
        addresses = VringAddr(index, logged[0], desc, used, avail, logged[1])
        place_ring([region.payload for region in self._regions], addresses, size, packed=packed)
        base = VringState(index, config.next_index)
        self.tell(lib.VHOST_USER_SET_VRING_NUM, VRING_STATE.encode(VringState(index, size)))
        self.tell(lib.VHOST_USER_SET_VRING_BASE, VRING_STATE.encode(base))
        self.tell(lib.VHOST_USER_SET_VRING_ADDR, VRING_ADDR.encode(addresses))
        if config.err_fd >= 0:
            self.set_err(index, config.err_fd)
        self.set_call(index, config.call_fd)
        self.set_kick(index, config.kick_fd)
        if config.enabled and self.features & F_PROTOCOL:
            self.enable_ring(index, True)

    def set_call(self, index: int, fd: int) -> None:
        """The eventfd by which the back-end calls; -1 = none."""
        self._vring_fd(lib.VHOST_USER_SET_VRING_CALL, index, fd)

    def set_err(self, index: int, fd: int) -> None:
        """The eventfd by which the back-end tells of a broken ring; -1 = none."""
        self._vring_fd(lib.VHOST_USER_SET_VRING_ERR, index, fd)

    def set_kick(self, index: int, fd: int) -> None:
        """The eventfd by which the driver kicks; -1 = the back-end polls."""
        self._vring_fd(lib.VHOST_USER_SET_VRING_KICK, index, fd)

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Has the back-end serve a started ring, or leave it alone."""
        if not self.features & F_PROTOCOL:
            raise NotSupported("the back-end has no way to enable or disable rings")
        state = VringState(index, int(enabled))
        self.tell(lib.VHOST_USER_SET_VRING_ENABLE, VRING_STATE.encode(state))

    def stop_ring(self, index: int) -> int:
        """Stops and drains a ring; the index to go on from.

        With GET_VRING_BASE_INFLIGHT agreed on, a back-end may leave what is in flight noted in the
        region of `set_inflight` instead, for the next one.
        """
        request = lib.VHOST_USER_GET_VRING_BASE
        with self._exchange(request) as deadline:
            question = VRING_STATE.encode(VringState(index, 0))
            self._send(encode(request, question), (), deadline)
            answer = VRING_STATE.decode(self._reply(request, VRING_STATE, deadline))
            if answer.ring != index or answer.num >> index_bits(self.features):
                raise PeerError(f"base {answer.num} of ring {answer.ring}, asked for {index}'s")
        return int(answer.num)

    def _vring_fd(self, request: int, index: int, fd: int) -> None:
        number = index if fd >= 0 else index | lib.VHOST_USER_VRING_NOFD
        self.tell(request, U64.encode(number), [fd] if fd >= 0 else [])

    def _user_address(self, guest: int) -> int:
        for region in self._regions:
            if region.guest_addr <= guest < region.guest_addr + region.size:
                return region.user_addr + guest - region.guest_addr
        raise PeerError(f"ring at guest address {guest:#x}: a part of it lies outside guest memory")

    def _needs(self, bit: int, lack: str) -> None:
        if not self.has_protocol(bit):
            raise NotSupported(f"the back-end {lack}")
