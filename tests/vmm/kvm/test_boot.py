"""Debian's kernels boot on our machine, in all its shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.kvm.guest import MIB, booted, config_of
from vdev.vmm.api import End, Outcome
from vdev.vmm.config import DiskConfig

# Pairwise: every two of flavour, image, transport, console and number of CPUs meet somewhere.
SHAPES = [
    pytest.param("generic", False, "pci", "serial", 1, 256, marks=pytest.mark.long),
    pytest.param("generic", False, "mmio", "virtio", 2, 3072, marks=pytest.mark.long),
    ("generic", True, "pci", "virtio", 4, 6144),
    pytest.param("cloud", False, "mmio", "serial", 4, 5120, marks=pytest.mark.long),
    pytest.param("cloud", False, "pci", "virtio", 2, 3074, marks=pytest.mark.long),
    ("cloud", True, "mmio", "serial", 1, 96),
]

_HARMLESS = (
    # Linux says so where no I/O ports lead to it, before it has read ACPI's tables.
    "PCI: Fatal: No config space access function found",
    # The driver of a virtio console is a module in the initrd.
    "Warning: unable to open an initial console.",
)


@pytest.mark.parametrize(("flavour", "bzimage", "transport", "console", "cpus", "memory"), SHAPES)
async def test_a_guest_finds_the_machine_as_configured(
    material: Material,
    flavour: str,
    bzimage: bool,
    transport: str,
    console: str,
    cpus: int,
    memory: int,
) -> None:
    bootable = getattr(material, flavour)
    config = config_of(
        bootable,
        bzimage=bzimage,
        transport=transport,
        console=console,
        cpus=cpus,
        memory=memory * MIB,
        disks=(DiskConfig("null:64M", queues=cpus),),
    )
    async with booted(config) as guest:
        assert await guest.sh("uname -r") == f"{bootable.release}\n"
        assert await guest.sh("nproc") == f"{cpus}\n"

        topology = "cd /sys/devices/system/cpu; cat cpu[0-9]*/topology/"
        assert sorted((await guest.sh(f"{topology}core_id")).split()) == sorted(
            str(cpu) for cpu in range(cpus)
        )
        assert set((await guest.sh(f"{topology}physical_package_id")).split()) == {"0"}
        one_each = {f"{cpu}" for cpu in range(cpus)}
        assert set((await guest.sh(f"{topology}thread_siblings_list")).split()) == one_each

        flags = set((await guest.sh("grep -m1 ^flags /proc/cpuinfo")).split())
        clocks = "cd /sys/devices/system/clocksource/clocksource0; cat "
        assert await guest.sh(f"{clocks}current_clocksource") == "kvm-clock\n"
        # Emulated CPUs do not say that their TSCs run alike.
        usable = cpus == 1 or "constant_tsc" in flags
        assert ("tsc" in (await guest.sh(f"{clocks}available_clocksource")).split()) == usable
        assert {"x2apic", "hypervisor", "tsc_deadline_timer"} <= flags
        assert "x2apic enabled" in await guest.sh("dmesg | grep -i x2apic")

        found = int((await guest.sh("awk '/MemTotal/ { print $2 }' /proc/meminfo")).strip()) * 1024
        assert 0.75 * memory * MIB - 64 * MIB < found < memory * MIB
        # What is above the hole is RAM that can be used, and lazily allocated.
        iomem = await guest.sh("grep 'System RAM' /proc/iomem")
        assert ("100000000-" in iomem) == (memory > 3072), iomem
        resident = guest.machine.info()["resident"]
        assert resident < min(memory * MIB, 600 * MIB)
        # What firmware's place and the kernel's file took in small pages aside.
        assert in_huge_pages() > resident / 2

        await guest.sh("dd if=/dev/vda of=/dev/null bs=1M count=8 iflag=direct")
        interrupts = await guest.sh("cat /proc/interrupts")
        for queue in range(cpus):
            assert interrupted(
                interrupts, "virtio0" if transport == "mmio" else f"req.{queue}"
            ) in (("IO-APIC",) if transport == "mmio" else ("PCI-MSI",)), interrupts
        errors = (await guest.sh("dmesg -r | grep '^<[0-3]>' || true")).splitlines()
        assert not [line for line in errors if not line.endswith(_HARMLESS)], errors
        assert await guest.power_off() == Outcome(End.SHUTDOWN)


def in_huge_pages() -> int:
    """Bytes of guests' RAM that this process has mapped so."""
    found, ram = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            ram = "guest-ram" in line
        elif ram and name == "ShmemPmdMapped:":
            found += int(words[0]) << 10
    return found


def interrupted(interrupts: str, name: str) -> str:
    """The kind of controller of the interrupt whose name ends so."""
    for line in interrupts.splitlines():
        if line.rstrip().endswith(name):
            found = re.search(r"(IO-APIC|PCI-MSI)", line)
            return found[1] if found else ""
    return ""
