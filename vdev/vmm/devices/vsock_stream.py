"""One stream between a guest's socket and a Unix socket of the host.

Theory of operation.  Each direction is bounded by the credit of its receiver (virtio 1.3, section
5.10.6.3).  From the guest: what the Unix socket does not take at once waits in `_unsent`, at most
`BUFFER` bytes, which is what we told the guest.  To the guest: nothing waits here at all; bytes
are read from the Unix socket when there is a receive buffer to put them into and credit to do so.
A stream that could use a receive buffer says so by `Owner.want`, and is asked by `next_packet`.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Protocol

from vdev._native import lib
from vdev.vmm.devices.vsock_packet import Header

BUFFER = 128 << 10
DATA_MOST = 64 << 10
_MODULUS = 1 << 32

_SEND: int = lib.VIRTIO_VSOCK_SHUTDOWN_SEND
_RECEIVE: int = lib.VIRTIO_VSOCK_SHUTDOWN_RECEIVE
_BOTH = _SEND | _RECEIVE


class Owner(Protocol):
    """What a stream needs of the device."""

    def want(self, stream: Stream) -> None:
        """The stream has something for the guest."""

    def end(self, stream: Stream, *, reset: bool) -> None:
        """The stream is over; `reset` tells the guest."""


class Violation(Exception):
    """The guest broke the rules of its stream."""


class Stream:
    """A stream over `sock`, which it closes in the end.

    guest_cid, guest_port, host_port: its addresses.  accepted: the guest asked for it; otherwise
    the host did, and the guest's answer is to come.
    """

    def __init__(
        self,
        owner: Owner,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        guest_cid: int,
        guest_port: int,
        host_port: int,
        accepted: bool,
    ) -> None:
        self.guest_port = guest_port
        self.host_port = host_port
        self.open = accepted
        self.announced = accepted  # the guest knows of it
        self._owner = owner
        self._loop = loop
        self._sock = sock
        self._guest_cid = guest_cid
        self._opening: int | None = (
            lib.VIRTIO_VSOCK_OP_RESPONSE if accepted else lib.VIRTIO_VSOCK_OP_REQUEST
        )
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

        self._unsent = bytearray()
        self._received = self._forwarded = self._told = 0  # modulo 2^32, as are all such counts
        self._credit_due = False
        self._guest_shut = 0
        self._wrote_end = False

        self._readable = False  # the Unix socket may have something
        self._reading = True
        self._asked = False  # for credit, since it ran out
        self._sent = 0
        self._guest_buffer = self._guest_forwarded = 0
        self._host_shut = 0
        self._host_shut_due = False

    def start_timer(self, seconds: float) -> None:
        """Gives the guest so long to answer."""
        self._timer = self._loop.call_later(seconds, self._fail)

    # ---- from the guest ----

    def credit(self, header: Header) -> None:
        """What every packet tells of the guest's buffer. Raises Violation."""
        if (self._sent - header.fwd_cnt) % _MODULUS > _MODULUS // 2:
            raise Violation("more was forwarded than was sent")
        self._guest_buffer, self._guest_forwarded = header.buf_alloc, header.fwd_cnt
        if self._window():
            self._asked = False
        self._want()

    def answer(self) -> None:
        """The guest accepted: the host's program is told in Firecracker's words."""
        if self.open:
            raise Violation("a response to no request")
        self._stop_timer()
        self.open = True
        greeting = b"OK %d\n" % self.host_port
        try:
            whole = self._sock.send(greeting) == len(greeting)
        except OSError:
            whole = False
        if not whole:
            self._fail()
            return
        self._rearm()

    def room(self) -> int:
        """Bytes that the guest may send."""
        return BUFFER - len(self._unsent)

    def receive(self, data: bytes) -> None:
        """A payload. Raises Violation where it is more than there is room for, or untimely."""
        if not self.open or self._guest_shut & _SEND or len(data) > self.room():
            raise Violation("data without leave")
        self._received = (self._received + len(data)) % _MODULUS
        if not self._unsent:
            data = data[self._forward(data) :]
        if self._closed or not data:
            return
        if not self._unsent:
            self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += data

    def request_credit(self) -> None:
        self._credit_due = True
        self._want()

    def shutdown(self, flags: int) -> None:
        """The guest will send, or receive, no more."""
        self._guest_shut |= flags & _BOTH
        if self._guest_shut & _RECEIVE:
            self._stop_reading()
        self._settle()

    # ---- to the guest ----

    def wants(self) -> bool:
        """Whether `next_packet` would have something to say."""
        if self._closed:
            return False
        if self._opening is not None or self._credit_due or self._host_shut_due:
            return True
        return self.open and self._readable and (self._window() > 0 or not self._asked)

    def next_packet(self, room: int) -> bytes | None:
        """The next packet with at most `room` bytes of payload, or None."""
        if self._opening is not None:
            op, self._opening = self._opening, None
            self.announced = True
            if self.open:
                self._rearm()
            return self._packet(op)
        if self.open and self._readable:
            packet = self._read(room)
            if packet is not None or self._closed:
                return packet
        if self._host_shut_due:
            self._host_shut_due = False
            return self._packet(lib.VIRTIO_VSOCK_OP_SHUTDOWN, flags=self._host_shut)
        if self._credit_due:
            return self._packet(lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        return None

    def reset(self) -> Header:
        """The packet that tells the guest of the end."""
        return self._header(lib.VIRTIO_VSOCK_OP_RST)

    def close(self) -> None:
        """Lets go of the Unix socket."""
        if self._closed:
            return
        self._closed = True
        self._stop_timer()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._unsent.clear()

    # ---- within ----

    def _header(self, op: int, *, size: int = 0, flags: int = 0) -> Header:
        return Header(
            src_cid=lib.VIRTIO_VSOCK_HOST_CID,
            dst_cid=self._guest_cid,
            src_port=self.host_port,
            dst_port=self.guest_port,
            len=size,
            type=lib.VIRTIO_VSOCK_TYPE_STREAM,
            op=op,
            flags=flags,
            buf_alloc=BUFFER,
            fwd_cnt=self._forwarded,
        )

    def _packet(self, op: int, data: bytes = b"", *, flags: int = 0) -> bytes:
        self._told = self._forwarded
        self._credit_due = False
        return self._header(op, size=len(data), flags=flags).pack() + data

    def _window(self) -> int:
        """Bytes that the guest has room for."""
        in_flight = (self._sent - self._guest_forwarded) % _MODULUS
        return max(0, self._guest_buffer - in_flight)

    def _read(self, room: int) -> bytes | None:
        window = self._window()
        if window == 0:
            if self._asked:
                return None
            self._asked = True
            return self._packet(lib.VIRTIO_VSOCK_OP_CREDIT_REQUEST)
        if room == 0:  # a buffer for headers only: something must fill it
            return self._packet(lib.VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        try:
            data = self._sock.recv(min(room, window, DATA_MOST))
        except BlockingIOError:
            self._readable = False
            self._rearm()
            return None
        except OSError:
            self._fail()
            return None
        if not data:
            self._stop_reading()
            self._host_shut = _BOTH if _hung_up(self._sock) else _SEND
            self._host_shut_due = True
            return None
        self._sent = (self._sent + len(data)) % _MODULUS
        return self._packet(lib.VIRTIO_VSOCK_OP_RW, data)

    def _want(self) -> None:
        if self.wants():
            self._owner.want(self)

    def _rearm(self) -> None:
        if self._reading and not self._readable:
            self._loop.add_reader(self._sock, self._on_readable)

    def _on_readable(self) -> None:
        self._loop.remove_reader(self._sock)
        self._readable = True
        self._want()

    def _stop_reading(self) -> None:
        self._reading = self._readable = False
        self._loop.remove_reader(self._sock)

    def _forward(self, data: bytes | bytearray) -> int:
        """Gives the Unix socket what it takes; returns how much that was."""
        try:
            count = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._fail()
            return 0
        self._forwarded = (self._forwarded + count) % _MODULUS
        # The guest believes that so much is in our buffer; at the half it is told the truth.
        if (self._received - self._told) % _MODULUS > BUFFER // 2:
            self._credit_due = True
            self._want()
        return count

    def _on_writable(self) -> None:
        count = self._forward(self._unsent)
        if self._closed:
            return
        del self._unsent[:count]
        if not self._unsent:
            self._loop.remove_writer(self._sock)
            self._settle()

    def _settle(self) -> None:
        """What the guest shut takes effect when all that it sent has arrived."""
        if self._closed or self._unsent or not self._guest_shut & _SEND:
            return
        if self._guest_shut == _BOTH:
            self._owner.end(self, reset=True)
        elif not self._wrote_end:
            self._wrote_end = True
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._fail()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self) -> None:
        self._owner.end(self, reset=self.announced)


def _hung_up(sock: socket.socket) -> bool:
    """Whether the other end is closed, not only shut for sending."""
    poller = select.poll()
    poller.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poller.poll(0))
