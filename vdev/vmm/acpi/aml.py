"""AML, the byte code of ACPI's DSDT (ACPI 6.3, chapter 20).

Every function returns the bytes of one term; terms nest by being arguments of each other. Strings
name objects (`path` encodes them), so a text constant is `string("...")`. What cannot be encoded
is a mistake of the caller's: ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum

NULL_NAME = b"\x00"
"""Where an operator's target may be left out."""
ONES = b"\xff"
LOCAL = tuple(bytes([0x60 + n]) for n in range(8))
ARG = tuple(bytes([0x68 + n]) for n in range(7))
WAIT_FOREVER = 0xFFFF

Value = bytes | int | str
"""A term: its bytes, an integer constant, or the path of an object."""

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")
_LENGTH_LIMITS = (1 << 6, 1 << 12, 1 << 20, 1 << 28)


class Space(IntEnum):
    """Address spaces of operation regions."""

    MEMORY = 0
    IO = 1


class Access(IntEnum):
    """The width by which a field's region is accessed."""

    BYTE = 1
    WORD = 2
    DWORD = 3


def _length(value: int, size: int) -> bytes:
    """`value` in PkgLength form, `size` bytes: 20.2.4."""
    if size == 1:
        return bytes([value])
    return bytes([(size - 1) << 6 | value & 0xF]) + (value >> 4).to_bytes(size - 1, "little")


def pkg_length(content: int) -> bytes:
    """The PkgLength that precedes `content` bytes: it counts itself."""
    for size, limit in enumerate(_LENGTH_LIMITS, 1):
        if content + size < limit:
            return _length(content + size, size)
    raise ValueError(f"a package of {content} bytes: AML cannot hold 256 MiB")


def _field_length(bits: int) -> bytes:
    """The width of a field's element, in PkgLength form but without itself."""
    for size, limit in enumerate(_LENGTH_LIMITS, 1):
        if 0 <= bits < limit:
            return _length(bits, size)
    raise ValueError(f"a field of {bits} bits: must be below {_LENGTH_LIMITS[-1]}")


def _package(opcode: bytes, content: bytes) -> bytes:
    return opcode + pkg_length(len(content)) + content


def segment(name: str) -> bytes:
    """A NameSeg: one to four characters, filled up with underscores."""
    if not _SEGMENT.fullmatch(name):
        raise ValueError(f"{name!r} is no ACPI name: one to four of A-Z, 0-9, _, no digit first")
    return name.ljust(4, "_").encode()


def path(name: str) -> bytes:
    r"""A NameString: `\_SB.PCI0` from the root, `^X` from the parent, `X.Y` from here."""
    relative = name.lstrip("^") if name.startswith("^") else name.removeprefix("\\")
    prefix = name[: len(name) - len(relative)].encode()
    if not relative and prefix:
        return prefix + NULL_NAME
    segments = [segment(part) for part in relative.split(".")]
    if len(segments) > 255:
        raise ValueError(f"a path of {len(segments)} names: at most 255")
    if len(segments) == 1:
        lead = b""
    elif len(segments) == 2:
        lead = b"\x2e"
    else:
        lead = b"\x2f" + bytes([len(segments)])
    return prefix + lead + b"".join(segments)


def integer(value: int) -> bytes:
    """An integer constant of up to 64 bits, in its shortest form."""
    if value in (0, 1):
        return bytes([value])
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([opcode]) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no unsigned integer of 64 bits")


def term(value: Value) -> bytes:
    """The bytes of a term that is given in any form."""
    if isinstance(value, int):
        return integer(value)
    return path(value) if isinstance(value, str) else value


def _terms(values: Sequence[Value]) -> bytes:
    return b"".join(term(value) for value in values)


def string(text: str) -> bytes:
    """A text constant: ASCII without NUL."""
    if not text.isascii() or "\0" in text:
        raise ValueError(f"{text!r}: an ACPI string is ASCII without NUL")
    return b"\x0d" + text.encode() + b"\0"


def buffer(data: bytes) -> bytes:
    """A buffer that starts as `data`."""
    return _package(b"\x11", integer(len(data)) + data)


def package(*elements: Value) -> bytes:
    """A package of up to 255 elements."""
    return _package(b"\x12", bytes([len(elements)]) + _terms(elements))


def eisa_id(text: str) -> bytes:
    """EISAID: three letters of five bits each, four hexadecimal digits (19.3.4)."""
    if not _EISA_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no EISA id: three letters A-Z, four digits 0-9, A-F")
    vendor = 0
    for letter in text[:3]:
        vendor = vendor << 5 | ord(letter) - 0x40
    big = vendor.to_bytes(2, "big") + bytes.fromhex(text[3:])
    return b"\x0c" + big


def to_uuid(text: str) -> bytes:
    """ToUUID: a buffer of 16 bytes, the first three fields little-endian (19.6.142)."""
    fields = [bytes.fromhex(field) for field in text.split("-")]
    if [len(field) for field in fields] != [4, 2, 2, 2, 6]:
        raise ValueError(f"{text!r} is no UUID")
    return buffer(b"".join([*(field[::-1] for field in fields[:3]), *fields[3:]]))


def scope(name: str, *terms: bytes) -> bytes:
    """More objects in a scope that exists."""
    return _package(b"\x10", path(name) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    """A device and the objects in it."""
    return _package(b"\x5b\x82", path(name) + b"".join(terms))


def method(name: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """A control method of up to seven arguments."""
    if not 0 <= arguments <= len(ARG):
        raise ValueError(f"a method of {arguments} arguments: at most {len(ARG)}")
    flags = bytes([arguments | serialized << 3])
    return _package(b"\x14", path(name) + flags + b"".join(terms))


def name(where: str, value: Value) -> bytes:
    """A named constant."""
    return b"\x08" + path(where) + term(value)


def mutex(where: str) -> bytes:
    """A mutex of the lowest level."""
    return b"\x5b\x01" + path(where) + b"\0"


def operation_region(where: str, space: Space, offset: int, length: int) -> bytes:
    """`length` bytes of registers at `offset` of an address space."""
    return b"\x5b\x80" + path(where) + bytes([space]) + integer(offset) + integer(length)


def field(region: str, access: Access, *elements: tuple[str | None, int]) -> bytes:
    """Names for the bits of a region: (name, width) in order; the name None leaves bits out.

    Bits beside a written field keep their values; no global lock.
    """
    content = path(region) + bytes([access])
    for label, bits in elements:
        content += (b"\0" if label is None else segment(label)) + _field_length(bits)
    return _package(b"\x5b\x81", content)


def create_dword_field(source: Value, index: int, where: str) -> bytes:
    """A name for four bytes of a buffer."""
    return b"\x8a" + term(source) + integer(index) + path(where)


def if_(condition: Value, *terms: bytes) -> bytes:
    """Runs `terms` where the condition is not zero."""
    return _package(b"\xa0", term(condition) + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """Right after `if_`: what runs otherwise."""
    return _package(b"\xa1", b"".join(terms))


def while_(condition: Value, *terms: bytes) -> bytes:
    """Runs `terms` as long as the condition is not zero."""
    return _package(b"\xa2", term(condition) + b"".join(terms))


def return_(value: Value) -> bytes:
    """Ends a method."""
    return b"\xa4" + term(value)


def store(source: Value, target: Value) -> bytes:
    """target = source."""
    return b"\x70" + term(source) + term(target)


def notify(where: Value, value: Value) -> bytes:
    """Tells the driver of an object that `value` happened."""
    return b"\x86" + term(where) + term(value)


def acquire(where: str) -> bytes:
    """Takes a mutex, however long that lasts."""
    return b"\x5b\x23" + path(where) + WAIT_FOREVER.to_bytes(2, "little")


def release(where: str) -> bytes:
    """Gives a mutex back."""
    return b"\x5b\x27" + path(where)


def call(where: str, *arguments: Value) -> bytes:
    """Calls a method, which must have just as many arguments: AML does not repeat the number."""
    return path(where) + _terms(arguments)


def _binary(opcode: int, left: Value, right: Value, target: Value) -> bytes:
    return bytes([opcode]) + term(left) + term(right) + term(target)


def add(left: Value, right: Value, target: Value = NULL_NAME) -> bytes:
    """left + right, also stored in `target`."""
    return _binary(0x72, left, right, target)


def shift_left(value: Value, count: Value, target: Value = NULL_NAME) -> bytes:
    """value << count, also stored in `target`."""
    return _binary(0x79, value, count, target)


def and_(left: Value, right: Value, target: Value = NULL_NAME) -> bytes:
    """left & right, also stored in `target`."""
    return _binary(0x7B, left, right, target)


def or_(left: Value, right: Value, target: Value = NULL_NAME) -> bytes:
    """left | right, also stored in `target`."""
    return _binary(0x7D, left, right, target)


def l_not(value: Value) -> bytes:
    """Whether this is zero."""
    return b"\x92" + term(value)


def l_equal(left: Value, right: Value) -> bytes:
    """left == right, of integers, strings or buffers."""
    return b"\x93" + term(left) + term(right)


def l_less(left: Value, right: Value) -> bytes:
    """left < right."""
    return b"\x95" + term(left) + term(right)
