"""What a guest's CPUID says: what KVM can show, and the machine's own topology.

One socket of so many cores, one thread each. Sources: Intel SDM volume 2, CPUID; AMD APM volume 3,
appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from typing import Any

from vdev._native import ffi, lib
from vdev.registers import check

_MAX_ENTRIES = 256
_INDEXED = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

_X2APIC = 1 << 21
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_HTT = 1 << 28


def supported(kvm_fd: int) -> list[dict[str, int]]:
    """The entries that KVM offers."""
    entries = ffi.new("struct vmm_cpuid[]", _MAX_ENTRIES)
    count = lib.vmm_kvm_cpuid(kvm_fd, entries, _MAX_ENTRIES)
    check(count, "CPUID")
    fields = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    return [{name: getattr(entries[at], name) for name in fields} for at in range(count)]


def of_vcpu(offered: list[dict[str, int]], apic_id: int, cpus: int) -> tuple[Any, int]:
    """The entries of one vCPU, as struct vmm_cpuid[] and their number."""
    bits = max(1, (cpus - 1).bit_length())
    entries = [dict(entry) for entry in offered if entry["function"] not in (0xB, 0x1F)]
    for entry in entries:
        _adapt(entry, apic_id, cpus, bits)
    entries += _topology(apic_id, cpus, bits)
    native = ffi.new("struct vmm_cpuid[]", entries)
    return native, len(entries)


def _adapt(entry: dict[str, int], apic_id: int, cpus: int, bits: int) -> None:
    function = entry["function"]
    if function == 0:
        entry["eax"] = max(entry["eax"], 0xB)
    elif function == 1:
        # Initial APIC id, logical processors, and the CLFLUSH line that was there.
        entry["ebx"] = apic_id << 24 | min(1 << bits, 255) << 16 | entry["ebx"] & 0xFFFF
        entry["ecx"] |= _X2APIC | _TSC_DEADLINE | _HYPERVISOR
        entry["edx"] = entry["edx"] & ~_HTT | (_HTT if cpus > 1 else 0)
    elif function == 4 and entry["eax"] & 0x1F:
        level = entry["eax"] >> 5 & 7
        sharing = (1 << bits) - 1 if level == 3 else 0
        entry["eax"] = (
            entry["eax"] & 0x3FFF | min(sharing, 0xFFF) << 14 | min((1 << bits) - 1, 63) << 26
        )
    elif function == 0x80000008:
        entry["ecx"] = entry["ecx"] & ~0xF0FF | bits << 12 | cpus - 1
    elif function == 0x8000001D and entry["eax"] & 0x1F:
        level = entry["eax"] >> 5 & 7
        sharing = cpus - 1 if level == 3 else 0
        entry["eax"] = entry["eax"] & 0x3FFF | sharing << 14
    elif function == 0x8000001E:
        entry["eax"], entry["ebx"], entry["ecx"] = apic_id, apic_id, 0


def _topology(apic_id: int, cpus: int, bits: int) -> list[dict[str, int]]:
    """Leaf 0xB: a level of threads (one), a level of cores, the end."""
    levels = [(0, 1, 1), (bits, cpus, 2), (0, 0, 0)]
    return [
        {
            "function": 0xB,
            "index": index,
            "flags": _INDEXED,
            "eax": shift,
            "ebx": count,
            "ecx": kind << 8 | index,
            "edx": apic_id,
        }
        for index, (shift, count, kind) in enumerate(levels)
    ]
