"""The framing of vhost-user: bytes ↔ messages.

Theory of operation.  A message is a header of three 32-bit words in native byte order (request,
flags, size of the payload), a payload, and possibly file descriptors that arrive with the first
byte of the header.  A `Decoder` is fed bytes as they come and gives whole messages; it checks all
that can be checked without knowing what a message means: version, flags and size.  Payloads are
the business of `payloads`, the meaning that of `table` and `session`.

Rule 1: nothing here does I/O.  File descriptors are numbers that pass through.
Rule 2: whoever reads for a decoder reads at most `wanted` bytes at a time.  So a header is read
before its payload, and descriptors never cross from one message into another.
Rule 3: a decoder that raised is of no more use; there is no way to find the next message.

Source: vhost-user specification, "Message Specification".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vdev._native import ffi, lib
from vdev.errors import PeerError

HEADER_SIZE: int = ffi.sizeof("struct vhost_user_header")
MAX_PAYLOAD: int = lib.VHOST_USER_MAX_PAYLOAD
VERSION: int = lib.VHOST_USER_VERSION
REPLY: int = lib.VHOST_USER_REPLY
NEED_REPLY: int = lib.VHOST_USER_NEED_REPLY

_VERSION_MASK: int = lib.VHOST_USER_VERSION_MASK
_HEADER = struct.Struct("=III")
assert _HEADER.size == HEADER_SIZE


class Header(NamedTuple):
    request: int
    flags: int
    size: int


@dataclass(slots=True)
class Message:
    """A framed message. `fds` are owned by the message until someone takes them out."""

    request: int
    flags: int = VERSION
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & NEED_REPLY)


def encode(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """The bytes of a message; the version is added to `flags`."""
    return _HEADER.pack(request, VERSION | flags, len(payload)) + payload


def decode_reply(data: bytes | bytearray, request: int) -> Header:
    """Checks and splits the header of the back-end's reply to `request`.

    Raises PeerError for the reply to another request, other flags than a reply's, and a payload
    that is too large.
    """
    header = Header(*_HEADER.unpack_from(data))
    if header.request != request:
        raise PeerError(f"a reply to request {header.request}, expected one to {request}")
    if header.flags != VERSION | REPLY:
        raise PeerError(
            f"reply to request {request}: flags {header.flags:#x}, expected {VERSION | REPLY:#x}"
        )
    if header.size > MAX_PAYLOAD:
        raise PeerError(
            f"reply to request {request}: payload of {header.size} bytes, at most {MAX_PAYLOAD}"
        )
    return header


def decode_header(data: bytes | bytearray) -> Header:
    """Checks and splits the header of a message from the front-end, or of one to it.

    Raises PeerError for another version, reserved flags, a reply (we asked for none), and a
    payload that is too large.
    """
    header = Header(*_HEADER.unpack_from(data))
    if header.flags & _VERSION_MASK != VERSION:
        raise PeerError(
            f"request {header.request}: version {header.flags & _VERSION_MASK}, expected {VERSION}"
        )
    if header.flags & REPLY:
        raise PeerError(f"request {header.request}: a reply, but none was asked for")
    if reserved := header.flags & ~(_VERSION_MASK | REPLY | NEED_REPLY):
        raise PeerError(f"request {header.request}: reserved flags {reserved:#x} are set")
    if header.size > MAX_PAYLOAD:
        raise PeerError(
            f"request {header.request}: payload of {header.size} bytes, at most {MAX_PAYLOAD}"
        )
    return header


class Decoder:
    """Puts messages together from bytes in any pieces."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[int] = []
        self._header: Header | None = None

    @property
    def wanted(self) -> int:
        """How many bytes are missing to the end of the header, or then of the payload."""
        header = self._header
        size = HEADER_SIZE if header is None else HEADER_SIZE + header.size
        return max(size - len(self._data), 0)

    @property
    def inside(self) -> bool:
        """Whether a message has begun and is not whole."""
        return bool(self._data)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Takes bytes, and the descriptors that came with the first of them.

        Raises PeerError for descriptors inside a message, and for a bad header.
        """
        if fds and self._data:
            raise PeerError("file descriptors in the middle of a message")
        self._fds.extend(fds)
        self._data += data
        self._parse_header()

    def next_message(self) -> Message | None:
        """The next whole message, or None where bytes are missing. Raises PeerError."""
        header = self._header
        if header is None or self.wanted:
            return None
        end = HEADER_SIZE + header.size
        fds, self._fds = self._fds, []
        message = Message(header.request, header.flags, bytes(self._data[HEADER_SIZE:end]), fds)
        del self._data[:end]
        self._header = None
        self._parse_header()
        return message

    def save(self) -> tuple[bytes, list[int]]:
        """What came of a message that is not whole, for `feed`; its descriptors stay here."""
        return bytes(self._data), list(self._fds)

    def take_fds(self) -> list[int]:
        """The descriptors of the message that will never be complete, for closing."""
        fds, self._fds = self._fds, []
        return fds

    def end(self) -> None:
        """The stream ended. Raises PeerError inside a message."""
        if self._data:
            part = "header" if self._header is None else "payload"
            raise PeerError(f"the connection ended in the {part} of a message")

    def _parse_header(self) -> None:
        if self._header is None and len(self._data) >= HEADER_SIZE:
            self._header = decode_header(self._data)
