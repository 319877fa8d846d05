"""A VMM's exits and CPU time, as the kernel counts them.

How many exits by KVM's statistics of the machine; why, by histograms on KVM's tracepoints
(Documentation/trace/histogram.rst), which cost something at each exit and are therefore apart.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

KVM = Path("/sys/kernel/debug/kvm")
EVENTS = Path("/sys/kernel/tracing/events/kvm")
_KEYS = {"kvm_exit": "exit_reason", "kvm_msr": "ecx", "kvm_page_fault": "error_code"}
_ENTRY = re.compile(r"\{ \w+: +([0-9a-f]+) +\} hitcount: +(\d+)")
_SVM = {
    0x060: "interrupt",
    0x064: "interrupt window",
    0x078: "HLT",
    0x07B: "port",
    0x07C: "MSR",
    0x400: "page",
}
"""AMD APM volume 2, appendix C."""
_VMX = {1: "interrupt", 7: "interrupt window", 12: "HLT", 30: "port", 31: "MSR", 32: "MSR"}
_VMX |= {48: "page", 49: "device"}
"""Intel SDM volume 3, appendix C."""
_MSRS = {0x6E0: "timer", 0x80B: "EOI"}
_RESERVED = 1 << 3
"""Of a page fault's error code: a page that KVM marked as a device's, on AMD's processors."""
REASONS = (
    *("interrupt", "interrupt window", "HLT", "timer", "EOI", "other MSR"),
    *("port", "device", "memory", "other"),
)


def total(pid: int) -> int:
    """Of all vCPUs of a process's machine."""
    (place,) = KVM.glob(f"{pid}-*")
    return int((place / "exits").read_text())


def cpu_seconds(pid: int, *, vcpus: bool = True) -> float:
    """Of all threads there are now, or all but the vCPUs' (sched-stats.rst, schedstat)."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if vcpus or not (name.startswith("vdev-vcpu") or name.endswith("/KVM")):
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], dict[str, int]]]:
    """While the block runs, exits of all machines are counted by reason: what it yields tells.

    timer: writes of the TSC deadline.  device: accesses to memory that is a device's, so also
    virtqueues' notifications.  memory: pages that the machine touched for the first time.
    Raises OSError where the kernel has no such histograms.
    """
    triggers = {event: f"hist:keys={key}.hex" for event, key in _KEYS.items()}
    with contextlib.ExitStack() as stack:
        for event, trigger in triggers.items():
            path = EVENTS / event / "trigger"
            path.write_text(trigger)
            stack.callback(path.write_text, f"!{trigger}")
        yield lambda: by_reason({event: (EVENTS / event / "hist").read_text() for event in _KEYS})


def by_reason(histograms: dict[str, str]) -> dict[str, int]:
    """Of the texts of the three histograms, by event."""
    exits, msrs, faults = (
        {int(key, 16): int(count) for key, count in _ENTRY.findall(histograms[event])}
        for event in _KEYS
    )
    names = _SVM if any(reason >= 0x60 for reason in exits) else _VMX
    found = Counter[str]()
    for reason, count in exits.items():
        found[names.get(reason, "other")] += count
    for msr, count in msrs.items():
        found[_MSRS.get(msr, "other MSR")] += count
    pages, found["MSR"] = found["page"], 0
    if names is _SVM:
        found["device"] = sum(count for code, count in faults.items() if code & _RESERVED)
    found["memory"] = max(0, pages - found["device"]) if names is _SVM else pages
    return {reason: found[reason] for reason in REASONS}
