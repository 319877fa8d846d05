"""As many processors as a machine can have, on this host's KVM: a guest of a few instructions is
enough, which any kind of KVM runs.

The first processor wakes all others, each of which says its APIC id on the serial port: 255 where
two leaves of CPUID do not agree.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.vmm.boot_images import elf
from vdev.vmm.config import MachineConfig
from vdev.vmm.layout import ACPI_BASE, CPUS_MAX, KERNEL_BASE, MIB
from vdev.vmm.machine import Machine
from vdev.vmm.ram import Ram

_LOW = 0x8000
"""Where a processor begins that is told page 8 (Intel SDM volume 3, MP initialization)."""
_OTHERS = bytes.fromhex(
    "66b801000000 0fa2"  # cpuid 1
    "66c1eb18 6689de"  # esi = ebx >> 24
    "66b80b000000 6631c9 0fa2"  # cpuid 0xb
    "6639f2 7402 b2ff"  # dl = edx == esi ? dl : 255
    "88d0 baf803 ee"  # out 0x3f8, dl
    "f4 ebfd"  # halts
)
_WAKE_ALL = (0xC4500, 0xC4608)
"""INIT and start-up at page 8, to all but the sender."""
_COMMAND = 0xFEE00300
_MOV_EAX, _STORE_EAX = b"\xb8", b"\xa3"
_MADT_X2APIC, _ENABLED = 9, 1


def _kernel() -> bytes:
    first = bytes.fromhex("fa") + b"".join(
        opcode + struct.pack("<I", value)
        for opcode, value in (
            (b"\xbe", KERNEL_BASE + 0x200),
            (b"\xbf", _LOW),
            (b"\xb9", len(_OTHERS)),
        )
    )
    first += bytes.fromhex("f3a4")  # rep movsb
    for command in _WAKE_ALL:
        first += _MOV_EAX + struct.pack("<I", command) + _STORE_EAX + struct.pack("<I", _COMMAND)
    return elf([(KERNEL_BASE, (first + bytes.fromhex("f4ebfd")).ljust(0x200) + _OTHERS, 4096)])


@pytest.fixture
def kvm() -> None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"no usable KVM here: /dev/kvm: {error.strerror}")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("cpus", [2, CPUS_MAX])
async def test_each_processor_is_who_the_tables_say(tmp_path: Path, cpus: int) -> None:
    (tmp_path / "kernel").write_bytes(_kernel())
    config = MachineConfig(
        name="many", kernel=str(tmp_path / "kernel"), memory=64 * MIB, cpus=cpus, rng=False
    )
    async with Machine(config) as machine:
        await machine.start()
        said = bytearray()
        async for data in machine.console.attach():
            said += data
            if len(said) == cpus - 1:
                break
        assert sorted(said) == list(range(1, cpus))
        assert len(machine.counters()["vcpus"]) == cpus
        assert _apic_ids(machine._board.ram) == list(range(cpus))


def _apic_ids(ram: Ram) -> list[int]:
    """What the MADT has of processors that can be used (ACPI 6.5, section 5.2.12)."""

    def table(address: int) -> bytes:
        (size,) = struct.unpack("<I", ram.view(address + 4, 4))
        return bytes(ram.view(address, size))

    (root,) = struct.unpack("<Q", ram.view(ACPI_BASE + 24, 8))
    tables = [table(address) for (address,) in struct.iter_unpack("<Q", table(root)[36:])]
    (madt,) = (found for found in tables if found.startswith(b"APIC"))
    ids, at = [], 44
    while at < len(madt):
        kind, size = madt[at], madt[at + 1]
        if kind == 0 and madt[at + 4] & _ENABLED:
            ids.append(madt[at + 3])
        elif kind == _MADT_X2APIC:
            (id, flags) = struct.unpack_from("<II", madt, at + 4)
            ids += [id] * (flags & _ENABLED)
        at += size
    return ids
