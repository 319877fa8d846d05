r"""The DSDT: the devices that a guest cannot find by itself, and what they can be asked for.

The register block behind `\_SB.GED` is described in `registers.py`. Names here:

```
\_SB.GED   Generic Event Device: _EVT turns events into notifications
\_SB.PWRB  power button             \_SB.C000..  processors
\_SB.MBRD  registers, ECAM          \_SB.V000..  virtio-mmio
\_SB.PCI0  host bridge              \_SB.PCI0.S00..S1F  slots for hot-plug
\_SB.VGEN  generation ID            \_SB.PEVT  pvpanic     \_SB.COM1  8250
```
"""

from __future__ import annotations

from vdev.vmm import layout
from vdev.vmm.acpi import aml, resources
from vdev.vmm.acpi.platform import MmioDevice, Platform
from vdev.vmm.acpi.registers import S5_TYPE, Event, Register

# What Notify says: 5.6.6.
_DEVICE_CHECK = 1
_EJECT_REQUEST = 3
_DEVICE_EVENT = 0x80

_STA_WORKING = 0x0F

# PCI host bridge _OSC (PCI firmware specification 3.2, 4.5.1).
_OSC_UUID = "33DB4D5B-1FF7-401C-9657-7441C03DD766"
_OSC_DWORDS = 3
_OSC_FAILED, _OSC_BAD_UUID, _OSC_BAD_REVISION, _OSC_MASKED = 0x02, 0x04, 0x08, 0x10
# PME, AER and the capability structure. With native or SHPC hot-plug granted, a guest would no
# longer listen to the notifications of the slots.
_OSC_GRANTED = 0x1C


def _event_device(platform: Platform) -> bytes:
    events, slots = aml.LOCAL[0], aml.LOCAL[1]

    def when(event: Event, *terms: bytes) -> bytes:
        return aml.if_(aml.and_(events, event), *terms)

    def tell_slots(event: Event, source: str, value: int) -> bytes:
        return when(
            event,
            aml.store(source, slots),
            aml.store(slots, source),
            aml.call(r"\_SB.PCI0.TELL", slots, value),
        )

    handlers = [when(Event.POWER_BUTTON, aml.notify(r"\_SB.PWRB", _DEVICE_EVENT))]
    if platform.hotplug_slots:
        handlers.append(tell_slots(Event.SLOTS_INSERTED, "INSD", _DEVICE_CHECK))
        handlers.append(tell_slots(Event.SLOTS_REQUESTED, "REQD", _EJECT_REQUEST))
    if platform.vmgenid_address is not None:
        handlers.append(
            when(Event.GENERATION_CHANGED, aml.notify(r"\_SB.VGEN", _DEVICE_EVENT)),
        )
    names = {
        Register.EVENTS: "EVTS",
        Register.INSERTED: "INSD",
        Register.REQUESTED: "REQD",
        Register.EJECT: "EJCT",
    }
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources.template(resources.interrupt(layout.GED_GSI))),
        aml.mutex("EVLK"),
        aml.operation_region("REGS", aml.Space.IO, layout.HOTPLUG_PORT, layout.HOTPLUG_SIZE),
        aml.field("REGS", aml.Access.DWORD, *((names[register], 32) for register in Register)),
        aml.method(
            "_EVT",
            1,
            aml.acquire("EVLK"),
            aml.store("EVTS", events),
            aml.store(events, "EVTS"),
            *handlers,
            aml.release("EVLK"),
            serialized=True,
        ),
    )


def _power_button() -> bytes:
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", 0))


def _motherboard(platform: Platform) -> bytes:
    """What no other device claims. Linux uses ECAM only where it is reserved here."""
    claims = [
        resources.io_port(layout.POWER_PORT, layout.POWER_SIZE),
        resources.io_port(layout.HOTPLUG_PORT, layout.HOTPLUG_SIZE),
    ]
    if platform.pci:
        claims.append(resources.memory32_fixed(layout.ECAM_BASE, layout.ECAM_SIZE))
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources.template(*claims)),
    )


def _processor(uid: int) -> bytes:
    return aml.device(
        f"C{uid:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", uid),
        aml.name("_STA", _STA_WORKING),
    )


def _operating_system_capabilities() -> bytes:
    """_OSC: which parts of PCI Express the guest may manage by itself (6.2.11)."""
    uuid, revision, count, dwords = aml.ARG[:4]
    asked, granted = aml.LOCAL[0], aml.LOCAL[1]

    def flag(bit: int) -> bytes:
        return aml.or_("CDW1", bit, "CDW1")

    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(dwords, 0, "CDW1"),
        aml.if_(
            aml.l_not(aml.l_equal(uuid, aml.to_uuid(_OSC_UUID))),
            flag(_OSC_BAD_UUID),
            aml.return_(dwords),
        ),
        aml.if_(aml.l_not(aml.l_equal(revision, 1)), flag(_OSC_BAD_REVISION)),
        aml.if_(aml.l_less(count, _OSC_DWORDS), flag(_OSC_FAILED), aml.return_(dwords)),
        aml.create_dword_field(dwords, 8, "CDW3"),
        aml.store("CDW3", asked),
        aml.and_(asked, _OSC_GRANTED, granted),
        aml.if_(aml.l_not(aml.l_equal(asked, granted)), flag(_OSC_MASKED)),
        aml.store(granted, "CDW3"),
        aml.return_(dwords),
        serialized=True,
    )


def _slot(number: int) -> bytes:
    """Without _STA: the guest looks for the function in its config space."""
    return aml.device(
        f"S{number:02X}",
        aml.name("_ADR", number << 16),
        aml.name("_SUN", number),
        aml.method("_EJ0", 1, aml.store(1 << number, r"\_SB.GED.EJCT")),
    )


def _tell_slots(slots: range) -> bytes:
    """TELL(bitmap, value) notifies all slots of the bitmap."""
    return aml.method(
        "TELL",
        2,
        *(
            aml.if_(aml.and_(aml.ARG[0], 1 << slot), aml.notify(f"S{slot:02X}", aml.ARG[1]))
            for slot in slots
        ),
    )


def _host_bridge(platform: Platform) -> bytes:
    windows = [
        resources.bus_window(0, 1),
        resources.memory32_window(layout.BAR_BASE, layout.BAR_END),
    ]
    if platform.high_mmio is not None:
        windows.append(resources.memory64_window(*platform.high_mmio))
    hotplug = [_slot(slot) for slot in platform.hotplug_slots]
    if hotplug:
        hotplug.append(_tell_slots(platform.hotplug_slots))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_SEG", 0),
        aml.name("_BBN", 0),
        aml.name("_CRS", resources.template(*windows)),
        _operating_system_capabilities(),
        *hotplug,
    )


def _virtio_mmio(index: int, mmio: MmioDevice) -> bytes:
    claims = (resources.memory32_fixed(mmio.base, mmio.size), resources.interrupt(mmio.gsi))
    return aml.device(
        f"V{index:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", index),
        aml.name("_CRS", resources.template(*claims)),
    )


def _generation_id(address: int) -> bytes:
    """Microsoft's "Virtual Machine Generation ID"; the _CID is longer than ACPI has it."""
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("VDEV0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(address & 0xFFFFFFFF, address >> 32)),
    )


def _pvpanic() -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources.template(resources.io_port(layout.PVPANIC_PORT, 1))),
    )


def _serial() -> bytes:
    claims = (resources.io_port(layout.SERIAL_PORT, 8), resources.interrupt(layout.SERIAL_GSI))
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources.template(*claims)),
    )


def encode(platform: Platform) -> bytes:
    """The AML of a machine's DSDT, without the table's header."""
    devices = [
        _event_device(platform),
        _power_button(),
        _motherboard(platform),
        *(_processor(uid) for uid in range(len(platform.cpus))),
        *(_virtio_mmio(index, mmio) for index, mmio in enumerate(platform.mmio_devices)),
    ]
    if platform.pci:
        devices.append(_host_bridge(platform))
    if platform.vmgenid_address is not None:
        devices.append(_generation_id(platform.vmgenid_address))
    if platform.pvpanic:
        devices.append(_pvpanic())
    if platform.serial:
        devices.append(_serial())
    return aml.name(r"\_S5", aml.package(S5_TYPE, 0, 0, 0)) + aml.scope(r"\_SB", *devices)
