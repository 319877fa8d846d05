"""The tables of a machine: their form, what ACPICA reads in them, and what its interpreter does."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm.acpica import Machine, compile_asl, disassemble
from vdev.errors import UserError
from vdev.vmm import layout
from vdev.vmm.acpi import registers
from vdev.vmm.acpi.tables import MmioDevice, Platform, build

HEADER = 36


def mmio_devices(count: int) -> tuple[MmioDevice, ...]:
    size = layout.VIRTIO_MMIO_SIZE
    return tuple(
        MmioDevice(layout.MMIO_BASE + n * size, size, layout.MMIO_FIRST_GSI + n % 16)
        for n in range(count)
    )


FULL = Platform(
    cpus=(*range(63), 300),
    mmio_devices=mmio_devices(layout.MMIO_SLOTS),
    pci=True,
    hotplug_slots=range(32),
    vmgenid_address=0x12_3456_7000,
    pvpanic=True,
    serial=True,
    high_mmio=(1 << 40, 1 << 41),
)
PLATFORMS = {
    "least": Platform(cpus=(0,)),
    "mmio": Platform(cpus=(0, 1), mmio_devices=mmio_devices(2), serial=True, pvpanic=True),
    "pci": Platform(cpus=(0, 2), pci=True, hotplug_slots=range(3, 8), vmgenid_address=0xE9000),
    "pci without hot-plug": Platform(cpus=tuple(range(64)), pci=True),
    "64 CPUs": Platform(cpus=tuple(range(64))),
    "full": FULL,
}
every_platform = pytest.mark.parametrize("platform", PLATFORMS.values(), ids=PLATFORMS)


def table_at(image: bytes, address: int) -> bytes:
    offset = address - layout.ACPI_BASE
    assert 0 <= offset <= len(image) - HEADER
    assert offset % 16 == 0
    (size,) = struct.unpack_from("<I", image, offset + 4)
    assert size <= len(image) - offset
    return image[offset : offset + size]


def tables_of(image: bytes) -> dict[str, bytes]:
    """All tables by signature, found as a guest finds them."""
    (xsdt_address,) = struct.unpack_from("<Q", image, 24)
    xsdt = table_at(image, xsdt_address)
    found = [table_at(image, address) for (address,) in struct.iter_unpack("<Q", xsdt[HEADER:])]
    (dsdt_address,) = struct.unpack_from("<Q", found[0], 140)
    return {table[:4].decode(): table for table in (xsdt, *found, table_at(image, dsdt_address))}


def madt_entries(madt: bytes) -> list[tuple[int, bytes]]:
    entries, offset = [], HEADER + 8
    while offset < len(madt):
        kind, size = madt[offset : offset + 2]
        entries.append((kind, madt[offset : offset + size]))
        offset += size
    assert offset == len(madt)
    return entries


@every_platform
def test_lengths_and_checksums(platform: Platform) -> None:
    image = build(platform)
    assert len(image) <= layout.ACPI_SIZE
    assert image[:8] == b"RSD PTR "
    assert sum(image[:20]) & 0xFF == 0
    assert image[15] == 2
    assert struct.unpack_from("<I", image, 20) == (36,)
    assert sum(image[:36]) & 0xFF == 0
    found = tables_of(image)
    assert list(found) == ["XSDT", "FACP", "APIC", *(["MCFG"] if platform.pci else []), "DSDT"]
    for table in found.values():
        assert sum(table) & 0xFF == 0
    assert len(found["FACP"]) == 276
    assert found["DSDT"][8] == 2, "revision 1 would have integers of 32 bits"


@settings(max_examples=50)
@given(
    st.builds(
        Platform,
        cpus=st.lists(st.integers(0, 0xFFFFFFFE), min_size=1, max_size=64, unique=True).map(tuple),
        mmio_devices=st.integers(0, 32).map(mmio_devices),
        pci=st.just(True),
        hotplug_slots=st.tuples(st.integers(0, 31), st.integers(0, 32)).map(lambda t: range(*t)),
        vmgenid_address=st.none() | st.integers(0, (1 << 64) - 1),
        pvpanic=st.booleans(),
        serial=st.booleans(),
    )
)
def test_every_cpu_has_one_entry(platform: Platform) -> None:
    entries = madt_entries(tables_of(build(platform))["APIC"])
    seen = {}
    for kind, entry in entries:
        if kind == 0:
            uid, apic_id, flags = struct.unpack("<2xBBI", entry)
            assert apic_id < 255
        elif kind == 9:
            apic_id, flags, uid = struct.unpack("<4xIII", entry)
            assert apic_id >= 255
        else:
            assert (kind, entry[2:]) == (1, struct.pack("<BBII", 0, 0, layout.IOAPIC_BASE, 0))
            continue
        assert flags == 1
        seen[uid] = apic_id
    assert seen == dict(enumerate(platform.cpus))
    assert [kind for kind, _ in entries].count(1) == 1


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"for 2000 CPUs .* at most 61440 fit"):
        build(Platform(cpus=tuple(range(2000))))


@pytest.mark.parametrize(
    "parts",
    [
        {"cpus": ()},
        {"cpus": (1, 1)},
        {"cpus": (0,), "hotplug_slots": range(1, 2)},
        {"cpus": (0,), "pci": True, "hotplug_slots": range(30, 33)},
        {"cpus": (0,), "pci": True, "hotplug_slots": range(-1, 2)},
    ],
)
def test_contradictions_are_refused(parts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|without PCI"):
        Platform(**parts)  # type: ignore[arg-type]


@every_platform
def test_iasl_reads_every_table_and_makes_it_again(tmp_path: Path, platform: Platform) -> None:
    for signature, table in tables_of(build(platform)).items():
        again = compile_asl(tmp_path, disassemble(tmp_path, table))
        assert again[HEADER:] == table[HEADER:], signature


def test_what_iasl_reads_in_the_fadt(tmp_path: Path) -> None:
    text = disassemble(tmp_path, tables_of(build(FULL))["FACP"])

    def flag(label: str) -> str:
        found = re.search(rf"{re.escape(label)} \(V\d\) : (\d)", text)
        assert found, label
        return found[1]

    for label in ("Hardware Reduced", "Reset Register Supported", "VGA Not Present"):
        assert flag(label) == "1"
    for label in ("MSI Not Supported", "8042 Present on ports 60/64", "Legacy Devices Supported"):
        assert flag(label) == "0"
    for label, port in (
        ("Reset Register", layout.POWER_RESET),
        ("Sleep Control Register", layout.POWER_SLEEP_CONTROL),
        ("Sleep Status Register", layout.POWER_SLEEP_STATUS),
    ):
        register = text.split(f"{label} : [Generic Address Structure]")[1].split("\n\n")[0]
        assert "01 [SystemIO]" in register
        assert "Encoded Access Width : 01" in register
        assert f"Address : {layout.POWER_PORT + port:016X}" in register
    assert f"Value to cause reset : {layout.RESET_VALUE:02X}" in text


def test_what_iasl_reads_in_the_mcfg(tmp_path: Path) -> None:
    text = disassemble(tmp_path, tables_of(build(FULL))["MCFG"])
    assert f"Base Address : {layout.ECAM_BASE:016X}" in text
    for label in ("Segment Group Number", "Start Bus Number", "End Bus Number"):
        assert re.search(rf"{label} : 0+\n", text)


# Presets the registers, then does what a guest's driver does on an interrupt.
EVENT = r"""
DefinitionBlock ("", "SSDT", 2, "VDEV", "TEST", 1)
{
    External (\_SB.GED.EVTS, FieldUnitObj)
    External (\_SB.GED.INSD, FieldUnitObj)
    External (\_SB.GED.REQD, FieldUnitObj)
    External (\_SB.GED._EVT, MethodObj)
    Method (TEST, 3, Serialized)
    {
        \_SB.GED.EVTS = Arg0
        \_SB.GED.INSD = Arg1
        \_SB.GED.REQD = Arg2
        \_SB.GED._EVT (5)
    }
}
"""


def machine(folder: Path, platform: Platform) -> Machine:
    """All tables but the XSDT, since acpiexec makes one of what it is given."""
    found = tables_of(build(platform))
    del found["XSDT"]
    return Machine(folder, found.pop("DSDT"), compile_asl(folder, EVENT), *found.values())


@every_platform
def test_acpiexec_loads_the_tables(tmp_path: Path, platform: Platform) -> None:
    guest = machine(tmp_path, platform)
    report = guest.run("namespace")
    assert "2 ACPI AML tables successfully acquired and loaded" in report
    assert len(re.findall(r" C[0-9A-F]{3} Device ", report)) == len(platform.cpus)
    assert len(re.findall(r" V[0-9A-F]{3} Device ", report)) == len(platform.mmio_devices)
    assert len(re.findall(r" S[0-9A-F]{2}_ Device ", report)) == len(platform.hotplug_slots)
    for device, exists in (
        ("PCI0", platform.pci),
        ("COM1", platform.serial),
        ("PEVT", platform.pvpanic),
        ("VGEN", platform.vmgenid_address is not None),
    ):
        assert (f" {device} Device " in report) == exists


@pytest.mark.parametrize(
    ("events", "inserted", "requested", "notified"),
    [
        (0, 0xFF, 0xFF, []),
        (1, 0xFF, 0xFF, [("PWRB", 0x80)]),
        (2, 1 << 3 | 1 << 7, 0xFF, [("S03_", 1), ("S07_", 1)]),
        (4, 0xFF, 1 << 4, [("S04_", 3)]),
        (2, 0, 0, []),
        (6, 1 << 3, 1 << 3, [("S03_", 1), ("S03_", 3)]),
        (6, ~0xF8 & 0xFFFFFFFF, ~0xF8 & 0xFFFFFFFF, []),
        (8, 0xFF, 0xFF, [("VGEN", 0x80)]),
        (16, 0xFF, 0xFF, []),
        (0xF, 1 << 5, 1 << 6, [("PWRB", 0x80), ("S05_", 1), ("S06_", 3), ("VGEN", 0x80)]),
    ],
)
def test_events_reach_just_those_they_concern(
    tmp_path: Path, events: int, inserted: int, requested: int, notified: list[tuple[str, int]]
) -> None:
    guest = machine(tmp_path, PLATFORMS["pci"])
    run = rf"evaluate \TEST {events:#x} {inserted:#x} {requested:#x}"
    assert guest.notifications(run) == notified


def test_all_events_of_a_full_machine(tmp_path: Path) -> None:
    slots = [(f"S{slot:02X}".ljust(4, "_"), value) for slot in range(32) for value in (1, 3)]
    assert machine(tmp_path, FULL).notifications(r"evaluate \_SB.GED._EVT 5", fill=0xFF) == sorted(
        [("PWRB", 0x80), ("VGEN", 0x80), *slots]
    )


def test_a_machine_without_slots_ignores_their_events(tmp_path: Path) -> None:
    guest = machine(tmp_path, PLATFORMS["least"])
    run = r"evaluate \_SB.GED._EVT 5"
    assert guest.notifications(run, fill=0xFF) == [("PWRB", 0x80)]


def test_events_are_cleared_with_what_was_read(tmp_path: Path) -> None:
    """acpiexec's registers are plain memory, so the order is checked in the source."""
    source = disassemble(tmp_path, tables_of(build(PLATFORMS["pci"]))["DSDT"])
    method = source[source.index("Method (_EVT") :]
    steps = [
        "Local0 = EVTS",
        "EVTS = Local0",
        "Local1 = INSD",
        "INSD = Local1",
        "TELL (Local1, One)",
        "Local1 = REQD",
        "REQD = Local1",
        "TELL (Local1, 0x03)",
        "Release",
    ]
    places = [method.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize("slot", [0, 1, 7, 8, 30, 31])
def test_eject_names_its_slot(tmp_path: Path, slot: int) -> None:
    device = rf"\_SB.PCI0.S{slot:02X}"
    report = machine(tmp_path, FULL).run(
        f"evaluate {device}._EJ0 1",
        f"evaluate {device}._SUN",
        f"evaluate {device}._ADR",
        r"evaluate \_SB.GED.EJCT",
        r"evaluate \_SB.GED.EVTS",
    )
    values = [int(text, 16) for text in re.findall(r"\[Integer\] = ([0-9A-F]{16})", report)]
    assert values == [slot, slot << 16, 1 << slot, 0]


HOST_BRIDGE = "5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66"
OTHER = "6E B0 11 08 27 4A F9 44 8D 60 3C BB C2 2E 7B 48"


@pytest.mark.parametrize(
    ("uuid", "revision", "count", "asked", "answer"),
    [
        (HOST_BRIDGE, 1, 3, (0, 0x1F, 0x1F), (0x10, 0x1F, 0x1C)),
        (HOST_BRIDGE, 1, 3, (1, 0x1F, 0x1F), (0x11, 0x1F, 0x1C)),
        (HOST_BRIDGE, 1, 3, (0, 0x1F, 0x1C), (0, 0x1F, 0x1C)),
        (HOST_BRIDGE, 1, 3, (0, 0, 0x03), (0x10, 0, 0)),
        (HOST_BRIDGE, 1, 3, (0, 0, 0), (0, 0, 0)),
        (HOST_BRIDGE, 2, 3, (0, 0, 0x04), (0x08, 0, 0x04)),
        (HOST_BRIDGE, 1, 2, (0, 0x1F), (0x02, 0x1F)),
        (OTHER, 1, 3, (0, 0x1F, 0x1F), (0x04, 0x1F, 0x1F)),
        (OTHER, 1, 2, (0, 0x1F), (0x04, 0x1F)),
    ],
)
def test_hot_plug_is_never_left_to_the_guest(
    tmp_path: Path,
    uuid: str,
    revision: int,
    count: int,
    asked: tuple[int, ...],
    answer: tuple[int, ...],
) -> None:
    buffer = struct.pack(f"<{count}I", *asked).hex(" ").upper()
    call = rf"evaluate \_SB.PCI0._OSC ({uuid}) {revision} {count} ({buffer})"
    report = machine(tmp_path, PLATFORMS["pci"]).run(call)
    found = re.search(r"\[Buffer\] Length 0\w = +0000: ((?:[0-9A-F]{2} )+)", report)
    assert found, report
    assert struct.unpack(f"<{count}I", bytes.fromhex(found[1])) == answer


def test_where_the_generation_id_lies(tmp_path: Path) -> None:
    report = machine(tmp_path, FULL).run(r"evaluate \_SB.VGEN.ADDR")
    assert re.findall(r"\[Integer\] = ([0-9A-F]{16})", report) == [
        f"{0x34567000:016X}",
        f"{0x12:016X}",
    ]


def test_the_type_of_s5_is_what_the_machine_waits_for(tmp_path: Path) -> None:
    report = machine(tmp_path, FULL).run(r"evaluate \_S5")
    found = re.search(r"\[Integer\] = ([0-9A-F]{16})", report)
    assert found
    assert 1 << 5 | int(found[1], 16) << 2 == registers.SLEEP_S5


def test_the_bridge_gives_out_what_the_layout_has(tmp_path: Path) -> None:
    report = machine(tmp_path, FULL).run(r"resources \_SB.PCI0")
    text = report.split("16-Bit WORD Address Space Resource")[1]
    ends = re.findall(r"Address (?:Minimum|Maximum) : ([0-9A-F]+)", text)
    assert [int(end, 16) for end in ends] == [
        0,
        0,
        layout.BAR_BASE,
        layout.BAR_END - 1,
        1 << 40,
        (1 << 41) - 1,
    ]


def test_ecam_and_registers_are_reserved(tmp_path: Path) -> None:
    source = disassemble(tmp_path, tables_of(build(FULL))["DSDT"])
    board = source[source.index("Device (MBRD)") : source.index("Device (C000)")]
    assert f"0x{layout.ECAM_BASE:08X},         // Address Base" in board
    assert f"0x{layout.ECAM_SIZE:08X},         // Address Length" in board
    for port in (layout.POWER_PORT, layout.HOTPLUG_PORT):
        assert f"0x{port:04X},             // Range Minimum" in board
