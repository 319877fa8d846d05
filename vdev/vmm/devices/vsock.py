"""The socket device (virtio 1.3, section 5.10), whose host side are Unix sockets, named as
Firecracker names them.

A guest that connects to port P of the host (CID 2) reaches the Unix socket PATH_P.  A program of
the host connects to PATH, writes "CONNECT P\\n", and when the guest accepts reads "OK Q\\n", where
Q is the port that the guest sees it at; from there on it talks to port P of the guest.

The guest can neither fill our memory nor our log.  Streams are limited, and so is what each
buffers (`vsock_stream.py`).  Answers that belong to no stream wait in a bounded list: while it is
full nothing more is taken from the guest, until it gives buffers to answer into.  Packets that
cannot be answered are counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.virtio.batch import BatchDevice, Chain
from vdev.virtio.spec import RING_FEATURES
from vdev.vmm.devices.vsock_packet import HEADER_SIZE, Header
from vdev.vmm.devices.vsock_stream import Stream, Violation

RECEIVE, TRANSMIT, EVENT = 0, 1, 2
CID_LEAST, CID_MOST = 3, 0xFFFFFFFE
STREAMS_MOST = 512
ANSWERS_MOST = 256
PACKETS_A_TURN = 16
FIRST_PORT = 1 << 30
ACCEPT_RETRY = 1.0  # seconds, when the host has run out of descriptors

_LINE_MOST = 32
_CONNECT = re.compile(rb"CONNECT ([0-9]{1,10})\n", re.IGNORECASE)


class VsockDevice(BatchDevice):
    """A virtio-vsock device, listening at `path` while it exists.

    cid: the guest's context id.  connect_timeout: seconds that the guest has to answer a program
    of the host.  dropped: packets that had no answer, by reason.
    """

    device_id = lib.VIRTIO_ID_VSOCK
    features = RING_FEATURES | 1 << lib.VIRTIO_VSOCK_F_STREAM
    on_demand = frozenset({RECEIVE, TRANSMIT, EVENT})

    def __init__(
        self,
        cid: int,
        path: str | os.PathLike[str],
        *,
        iothreads: Sequence[IOThread],
        name: str = "vsock",
        connect_timeout: float = 10.0,
    ) -> None:
        if not CID_LEAST <= cid <= CID_MOST:
            raise UserError(f"vsock CID {cid}: a guest's is {CID_LEAST} to {CID_MOST}")
        self.name = name
        self.cid = cid
        self.path = os.fspath(path)
        self.dropped: Counter[str] = Counter()
        self._connect_timeout = connect_timeout
        self._streams: dict[tuple[int, int], Stream] = {}  # by host port and guest port
        self._wanting: dict[Stream, None] = {}  # in the order of their turns
        self._answers: deque[Header] = deque()
        self._greeting: dict[socket.socket, bytearray] = {}
        self._next_port = FIRST_PORT
        self._event_due = False
        self._turns: dict[int, asyncio.Handle] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._listener = _listen(self.path)
        try:
            super().__init__(3, iothreads)
        except BaseException:
            self._listener.close()
            os.unlink(self.path)
            raise
        self._loop.add_reader(self._listener, self._accept)

    # ---- the device ----

    def config(self) -> bytes:
        """struct virtio_vsock_config."""
        space = ffi.new("struct virtio_vsock_config *")
        space.guest_cid = self.cid
        return bytes(ffi.buffer(space))

    def reset(self) -> None:
        """All streams end, and the guest knows."""
        for stream in tuple(self._streams.values()):
            self.end(stream, reset=False)
        self._answers.clear()
        self._event_due = False
        self._later(TRANSMIT)  # which full answers may have held up

    def transport_reset(self) -> None:
        """The guest was restored from a snapshot: it is told that its streams are gone (5.10.6.7).

        It then reads its CID anew.
        """
        self.reset()
        self._event_due = True
        self.available(EVENT)

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._event_due = True

    def available(self, queue: int) -> None:
        if queue == RECEIVE:
            self._give()
        elif queue == TRANSMIT:
            self._take_packets()
        elif self._event_due:
            for chain in self.take(EVENT, 1):
                self._event_due = False
                event: int = lib.VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
                chain.write(event.to_bytes(4, "little"))
                chain.complete()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "vsock",
            "cid": self.cid,
            "path": os.path.abspath(self.path),
            "streams": len(self._streams),
            "dropped": dict(self.dropped),
        }

    def close(self) -> None:
        if not self.native:
            return
        self.reset()
        for sock in tuple(self._greeting):
            self._hang_up(sock)
        for turn in (*self._turns.values(), self._retry):
            if turn is not None:
                turn.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        super().close()

    # ---- for streams ----

    def want(self, stream: Stream) -> None:
        self._wanting[stream] = None
        self._later(RECEIVE)

    def end(self, stream: Stream, *, reset: bool) -> None:
        if self._streams.get((stream.host_port, stream.guest_port)) is not stream:
            return
        del self._streams[stream.host_port, stream.guest_port]
        self._wanting.pop(stream, None)
        stream.close()
        if reset:
            self._answer(stream.reset())

    # ---- to the guest ----

    def _later(self, queue: int) -> None:
        """A turn of `available` for the queue, once, so that others have theirs before."""
        if queue not in self._turns and self.native:
            self._turns[queue] = self._loop.call_soon(self._turn, queue)

    def _turn(self, queue: int) -> None:
        del self._turns[queue]
        self.available(queue)

    def _answer(self, header: Header) -> None:
        self._answers.append(header)
        self._later(RECEIVE)

    def _give(self) -> None:
        """Fills receive buffers: answers first, then each stream in turn."""
        for _ in range(PACKETS_A_TURN):
            if not self._answers and not self._wanting:
                return
            chains = self.take(RECEIVE, 1)
            if not chains:
                return
            (chain,) = chains
            if chain.writable_len < HEADER_SIZE:
                self.dropped["receive buffer too small"] += 1
                chain.complete(0)
                continue
            packet = self._next_packet(chain.writable_len - HEADER_SIZE)
            if packet is None:
                chain.give_back()
                continue
            chain.write(packet)
            chain.complete()
        self._later(RECEIVE)

    def _next_packet(self, room: int) -> bytes | None:
        if self._answers:
            if len(self._answers) == ANSWERS_MOST:
                self._later(TRANSMIT)
            return self._answers.popleft().pack()
        while self._wanting:
            stream = next(iter(self._wanting))
            del self._wanting[stream]
            packet = stream.next_packet(room)
            if stream.wants():
                self._wanting[stream] = None
            if packet is not None:
                return packet
        return None

    # ---- from the guest ----

    def _take_packets(self) -> None:
        for _ in range(PACKETS_A_TURN):
            if len(self._answers) >= ANSWERS_MOST:
                return
            chains = self.take(TRANSMIT, 1)
            if not chains:
                return
            try:
                self._receive(chains[0])
            finally:
                chains[0].complete(0)
        self._later(TRANSMIT)

    def _receive(self, chain: Chain) -> None:
        if chain.readable_len < HEADER_SIZE:
            self.dropped["no header"] += 1
            return
        header = Header.unpack(chain.read(HEADER_SIZE))
        if header.src_cid != self.cid:
            self.dropped["source is not the guest"] += 1
            return
        known = header.dst_cid == lib.VIRTIO_VSOCK_HOST_CID
        if not known or header.type != lib.VIRTIO_VSOCK_TYPE_STREAM:
            if header.op != lib.VIRTIO_VSOCK_OP_RST:
                self._answer(header.reset())
            return
        stream = self._streams.get((header.dst_port, header.src_port))
        if header.op == lib.VIRTIO_VSOCK_OP_RST:
            if stream is not None:
                self.end(stream, reset=False)
        elif stream is not None:
            try:
                self._work(stream, header, chain)
            except Violation:
                self.end(stream, reset=True)
        elif header.op == lib.VIRTIO_VSOCK_OP_REQUEST:
            self._connect(header)
        else:
            self._answer(header.reset())

    def _work(self, stream: Stream, header: Header, chain: Chain) -> None:
        stream.credit(header)
        if header.op == lib.VIRTIO_VSOCK_OP_RW:
            if header.len > min(chain.readable_len - HEADER_SIZE, stream.room()):
                raise Violation("a length beyond the packet or the credit")
            stream.receive(chain.read(header.len))
        elif header.op == lib.VIRTIO_VSOCK_OP_RESPONSE:
            stream.answer()
        elif header.op == lib.VIRTIO_VSOCK_OP_SHUTDOWN:
            stream.shutdown(header.flags)
        elif header.op == lib.VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            stream.request_credit()
        elif header.op != lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            raise Violation("an operation that is unknown or untimely")

    def _connect(self, header: Header) -> None:
        """The guest asks for a stream to PATH_PORT."""
        sock = None if self._is_full() else _connect(f"{self.path}_{header.dst_port}")
        if sock is None:
            self._answer(header.reset())
            return
        stream = self._add(sock, header.dst_port, header.src_port, accepted=True)
        stream.credit(header._replace(fwd_cnt=0))

    # ---- from the host ----

    def _is_full(self) -> bool:
        return len(self._streams) + len(self._greeting) >= STREAMS_MOST

    def _add(
        self, sock: socket.socket, host_port: int, guest_port: int, *, accepted: bool
    ) -> Stream:
        stream = Stream(
            self,
            self._loop,
            sock,
            guest_cid=self.cid,
            guest_port=guest_port,
            host_port=host_port,
            accepted=accepted,
        )
        self._streams[host_port, guest_port] = stream
        self.want(stream)
        return stream

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._log.warning("%s: accepting at %s: %s", self.name, self.path, error)
            self._loop.remove_reader(self._listener)
            self._retry = self._loop.call_later(
                ACCEPT_RETRY, self._loop.add_reader, self._listener, self._accept
            )
            return
        if self._is_full() or len(self._answers) >= ANSWERS_MOST:
            self.dropped["connection beyond the limit"] += 1
            sock.close()
            return
        sock.setblocking(False)
        self._greeting[sock] = bytearray()
        self._loop.add_reader(sock, self._greet, sock)

    def _greet(self, sock: socket.socket) -> None:
        """Reads the line, and nothing behind it."""
        line = self._greeting[sock]
        try:
            seen = sock.recv(_LINE_MOST - len(line), socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            line += sock.recv(end or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        if seen and not end and len(line) < _LINE_MOST:
            return
        found = _CONNECT.fullmatch(line)
        if found is None or int(found[1]) > 0xFFFFFFFF:
            self._hang_up(sock)
            return
        self._loop.remove_reader(sock)
        del self._greeting[sock]
        guest_port = int(found[1])
        stream = self._add(sock, self._free_port(guest_port), guest_port, accepted=False)
        stream.start_timer(self._connect_timeout)

    def _hang_up(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock)
        del self._greeting[sock]
        sock.close()

    def _free_port(self, guest_port: int) -> int:
        """A host port that no stream to this guest port has: there are far more than streams."""
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < 0xFFFFFFFE else FIRST_PORT
            if (port, guest_port) not in self._streams:
                return port


def _connect(path: str) -> socket.socket | None:
    """A connected Unix socket; None where nobody listens, or cannot be reached at once."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError:
        return None
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        return None
    return sock


def _listen(path: str) -> socket.socket:
    """Listens at `path`, in place of a socket that nobody listens at any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen()
    except OSError as error:
        sock.close()
        raise UserError(f"vsock socket {path!r}: {error.strerror or error}") from None
    return sock


def _is_stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
