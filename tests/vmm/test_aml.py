"""The AML writer: bytes of the specification, and bytes that ACPICA's compiler makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.acpica import compile_asl
from vdev.vmm.acpi import aml, resources

HEADER = 36


def compiled(folder: Path, body: str) -> bytes:
    return compile_asl(
        folder, f'DefinitionBlock ("", "SSDT", 2, "VDEV", "TEST", 1)\n{{\n{body}\n}}\n'
    )[HEADER:]


def pkg_length_of(data: bytes) -> tuple[int, int]:
    """The value of a PkgLength and the bytes it takes, as 20.2.4 has it."""
    more = data[0] >> 6
    if more == 0:
        return data[0] & 0x3F, 1
    assert data[0] & 0x30 == 0
    value = data[0] & 0xF
    for n in range(more):
        value |= data[1 + n] << 4 + 8 * n
    return value, 1 + more


@pytest.mark.parametrize(
    ("content", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (0xFFF - 2, "4fff"),
        (0xFFE, "810001"),
        (0xFFFFF - 3, "8fffff"),
        (0xFFFFD, "c1000001"),
        (0xFFFFFFF - 4, "cfffffff"),
    ],
)
def test_package_lengths_at_their_limits(content: int, encoded: str) -> None:
    assert aml.pkg_length(content).hex() == encoded


@given(st.one_of(*(st.integers(0, limit) for limit in (0x100, 0x1100, 0x100100, 0xFFFFFFB))))
def test_a_package_length_counts_itself_and_is_the_shortest(content: int) -> None:
    encoded = aml.pkg_length(content)
    assert pkg_length_of(encoded) == (content + len(encoded), len(encoded))
    shorter = len(encoded) - 1
    if shorter:
        assert content + shorter > (0x3F, 0xFFF, 0xFFFFF)[shorter - 1]


@given(st.integers(0, 0xFFFFFFF))
def test_the_width_of_a_field_does_not_count_itself(bits: int) -> None:
    encoded = aml.field("R", aml.Access.BYTE, (None, bits))
    size, taken = pkg_length_of(encoded[2:])
    assert 2 + size == len(encoded)
    element = encoded[2 + taken + 5 :]
    assert element[0] == 0
    assert pkg_length_of(element[1:]) == (bits, len(element) - 1)


@pytest.mark.parametrize("size", [0, 1, 55, 56, 57, 58, 59, 60, 61, 4080, 4086, 4090, 4100])
def test_packages_of_every_size_are_what_iasl_makes(tmp_path: Path, size: int) -> None:
    text = "x" * size
    assert compiled(tmp_path, f'Scope (\\_SB) {{ Name (TEXT, "{text}") }}') == aml.scope(
        r"\_SB", aml.name("TEXT", aml.string(text))
    )


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (0xFFFFFFFF, "0cffffffff"),
        (0x100000000, "0e0000000001000000"),
        (0xFFFFFFFFFFFFFFFF, "0effffffffffffffff"),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("A", b"A___"),
        ("_SB", b"_SB_"),
        ("\\", b"\\\0"),
        ("^", b"^\0"),
        (r"\_SB", b"\\_SB_"),
        ("^^ABCD", b"^^ABCD"),
        ("A.B", b"\x2eA___B___"),
        (r"\_SB.PCI0.S1F", b"\\\x2f\x03_SB_PCI0S1F_"),
        ("^A.B", b"^\x2eA___B___"),
    ],
)
def test_paths(name: str, encoded: bytes) -> None:
    assert aml.path(name) == encoded


@pytest.mark.parametrize("name", ["", "abcd", "ABCDE", "1ABC", "A..B", "A.", ".A", "A B", "\\\\A"])
def test_what_is_no_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.path(name)


def test_paths_have_a_limit() -> None:
    assert aml.path(".".join(["A"] * 255))[:2] == b"\x2f\xff"
    with pytest.raises(ValueError, match="256 names"):
        aml.path(".".join(["A"] * 256))


@pytest.mark.parametrize(
    ("text", "encoded"),
    [("PNP0A03", "0c41d00a03"), ("PNP0C0C", "0c41d00c0c"), ("ZZZFFFF", "0c6b5affff")],
)
def test_eisa_ids(text: str, encoded: str) -> None:
    assert aml.eisa_id(text).hex() == encoded


def test_a_uuid_has_the_byte_order_of_the_specification() -> None:
    encoded = aml.to_uuid("00112233-4455-6677-8899-AABBCCDDEEFF")
    assert encoded.hex() == "11130a10" + "33221100554477668899aabbccddeeff"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: aml.integer(-1),
        lambda: aml.integer(1 << 64),
        lambda: aml.string("ü"),
        lambda: aml.string("a\0b"),
        lambda: aml.eisa_id("pnp0a03"),
        lambda: aml.eisa_id("PNP0A0"),
        lambda: aml.to_uuid("no"),
        lambda: aml.package(*[0] * 256),
        lambda: aml.method("M", 8),
        lambda: aml.pkg_length((1 << 28) - 4),
        lambda: aml.field("R", aml.Access.BYTE, ("F", 1 << 28)),
        lambda: aml.field("R", aml.Access.BYTE, ("F", -1)),
        lambda: resources.io_port(0x10000, 1),
        lambda: resources.memory32_fixed(1 << 32, 1),
        lambda: resources.memory32_window(0xF0000000, 0x100000001),
        lambda: resources.memory64_window(5, 5),
        lambda: resources.bus_window(1, 0),
    ],
)
def test_what_cannot_be_encoded_is_refused(mistake: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        mistake()


CASES: dict[str, tuple[str, bytes]] = {
    "constants": (
        'Name (A, Zero) Name (B, 0x1234) Name (C, "text") Name (D, Buffer (3) {1, 2, 3})'
        "Name (E, Package (3) {One, Package (1) {Zero}, Ones})",
        aml.name("A", 0)
        + aml.name("B", 0x1234)
        + aml.name("C", aml.string("text"))
        + aml.name("D", aml.buffer(b"\1\2\3"))
        + aml.name("E", aml.package(1, aml.package(0), aml.ONES)),
    ),
    "ids": (
        'Name (A, EisaId ("PNP0A08")) Name (B, ToUUID ("33db4d5b-1ff7-401c-9657-7441c03dd766"))',
        aml.name("A", aml.eisa_id("PNP0A08"))
        + aml.name("B", aml.to_uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")),
    ),
    "fields": (
        "OperationRegion (RA, SystemIO, 0x610, 0x10)"
        "OperationRegion (RB, SystemMemory, Zero, 0x1000)"
        "Field (RA, DWordAcc, NoLock, Preserve) {F0, 32, F1, 5, , 27, F2, 64}"
        "Field (RB, ByteAcc, NoLock, Preserve) {, 4096, F3, 8, F4, 70}",
        aml.operation_region("RA", aml.Space.IO, 0x610, 0x10)
        + aml.operation_region("RB", aml.Space.MEMORY, 0, 0x1000)
        + aml.field("RA", aml.Access.DWORD, ("F0", 32), ("F1", 5), (None, 27), ("F2", 64))
        + aml.field("RB", aml.Access.BYTE, (None, 4096), ("F3", 8), ("F4", 70)),
    ),
    "flow": (
        "Device (DEV) { Name (_ADR, Zero) } Mutex (MTX, 0)"
        "Method (M, 2, Serialized) { Store (Zero, Local0)"
        "If (LEqual (Arg0, One)) { Return (Arg1) } Else {"
        "While (LLess (Local0, Arg1)) { Add (Local0, One, Local0) } }"
        "Acquire (MTX, 0xFFFF) Notify (DEV, 0x80) Release (MTX) Return (Local0) }"
        "Method (N, 1) { Return (M (2, Arg0)) }",
        aml.device("DEV", aml.name("_ADR", 0))
        + aml.mutex("MTX")
        + aml.method(
            "M",
            2,
            aml.store(0, aml.LOCAL[0]),
            aml.if_(aml.l_equal(aml.ARG[0], 1), aml.return_(aml.ARG[1])),
            aml.else_(
                aml.while_(
                    aml.l_less(aml.LOCAL[0], aml.ARG[1]),
                    aml.add(aml.LOCAL[0], 1, aml.LOCAL[0]),
                )
            ),
            aml.acquire("MTX"),
            aml.notify("DEV", 0x80),
            aml.release("MTX"),
            aml.return_(aml.LOCAL[0]),
            serialized=True,
        )
        + aml.method("N", 1, aml.return_(aml.call("M", 2, aml.ARG[0]))),
    ),
    "operators": (
        "Method (M, 4) { Store (And (Arg0, 7), Local0) Or (Arg1, 8, Local1)"
        "ShiftLeft (Arg2, Arg3, Local2) CreateDWordField (Arg0, 4, CDW2)"
        "If (LNot (LLess (Local0, Local1))) { Store (One, CDW2) } Return (Local2) }",
        aml.method(
            "M",
            4,
            aml.store(aml.and_(aml.ARG[0], 7), aml.LOCAL[0]),
            aml.or_(aml.ARG[1], 8, aml.LOCAL[1]),
            aml.shift_left(aml.ARG[2], aml.ARG[3], aml.LOCAL[2]),
            aml.create_dword_field(aml.ARG[0], 4, "CDW2"),
            aml.if_(
                aml.l_not(aml.l_less(aml.LOCAL[0], aml.LOCAL[1])),
                aml.store(1, "CDW2"),
            ),
            aml.return_(aml.LOCAL[2]),
        ),
    ),
    "resources": (
        "Name (RES, ResourceTemplate () { IO (Decode16, 0x3F8, 0x3F8, 1, 8)"
        "Memory32Fixed (ReadWrite, 0xE0000000, 0x100000)"
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {5}"
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, 0, 0xFF, 0, 0x100)"
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
        "0, 0xD0100000, 0xDFFFFFFF, 0, 0x0FF00000)"
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
        "0, 0x1000000000, 0x1FFFFFFFFF, 0, 0x1000000000) })",
        aml.name(
            "RES",
            resources.template(
                resources.io_port(0x3F8, 8),
                resources.memory32_fixed(0xE0000000, 0x100000),
                resources.interrupt(5),
                resources.bus_window(0, 0x100),
                resources.memory32_window(0xD0100000, 0xE0000000),
                resources.memory64_window(0x1000000000, 0x2000000000),
            ),
        ),
    ),
}


@pytest.mark.parametrize(("source", "encoded"), CASES.values(), ids=CASES)
def test_terms_are_what_iasl_makes(tmp_path: Path, source: str, encoded: bytes) -> None:
    assert compiled(tmp_path, re.sub(r"\b(?=(?:Method|Name|Device|Field) \()", "\n", source)) == (
        encoded
    )
