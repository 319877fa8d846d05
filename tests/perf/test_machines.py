"""The comparison of machines: what guests answer, what the kernel counts, what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from perf import exits
from perf.guests import AGENT, VMMS, Guest, Place
from perf.machines import LOADS, Figures, Sample, add, compared, figures_of, table_of, turned
from tests.lab.innermost import Bootable

PLACE = Place(Path("/root.img"), Path("/data.img"), "tap9", "10.78.9")
KERNEL = Bootable("6.1", Path("/vmlinux"), Path("/bzImage"), Path("/initrd"))

SVM = {
    "kvm_exit": """# event histogram
{ exit_reason:         60 } hitcount:          5
{ exit_reason:         64 } hitcount:          6
{ exit_reason:         72 } hitcount:          7
{ exit_reason:         78 } hitcount:          8
{ exit_reason:         7b } hitcount:          9
{ exit_reason:         7c } hitcount:         60
{ exit_reason:        400 } hitcount:        100
""",
    "kvm_msr": """
{ ecx:        6e0 } hitcount:         30
{ ecx:        80b } hitcount:         20
{ ecx:         3b } hitcount:         10
""",
    "kvm_page_fault": """
{ error_code:  100000006 } hitcount:         58
{ error_code:  10000000c } hitcount:          2
{ error_code:  10000000e } hitcount:         40
""",
}
VMX = {
    "kvm_exit": """
{ exit_reason:          1 } hitcount:          5
{ exit_reason:          7 } hitcount:          6
{ exit_reason:          a } hitcount:          7
{ exit_reason:          c } hitcount:          8
{ exit_reason:         1e } hitcount:          9
{ exit_reason:         1f } hitcount:          4
{ exit_reason:         20 } hitcount:         56
{ exit_reason:         30 } hitcount:         58
{ exit_reason:         31 } hitcount:         42
""",
    "kvm_msr": SVM["kvm_msr"],
    # Only of memory, by Intel's bits.
    "kvm_page_fault": "{ error_code:        182 } hitcount:         58\n",
}


SPIN = """
import sys, threading, time

def spin(name):
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
        comm.write(name)
    while time.thread_time() < 0.3:
        pass
    print(flush=True)
    threading.Event().wait()

for name in ("vdev-vcpu0", "CPU 0/KVM"):
    threading.Thread(target=spin, args=(name,), daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.parametrize("histograms", [SVM, VMX], ids=["svm", "vmx"])
def test_exits_by_reason(histograms: dict[str, str]) -> None:
    assert exits.by_reason(histograms) == {
        "interrupt": 5,
        "interrupt window": 6,
        "HLT": 8,
        "timer": 30,
        "EOI": 20,
        "other MSR": 10,
        "port": 9,
        "device": 42,
        "memory": 58,
        "other": 7,
    }


def test_nothing_counted_yet() -> None:
    assert not any(exits.by_reason(dict.fromkeys(SVM, "# event histogram\n")).values())


async def test_cpu_time_of_a_process_and_without_its_vcpus() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SPIN),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(2):
        await process.stdout.readline()
    everything = exits.cpu_seconds(process.pid)
    beside = exits.cpu_seconds(process.pid, vcpus=False)
    assert everything - beside >= 0.55
    await process.communicate(b"")


@contextlib.asynccontextmanager
async def guest_that_runs(script: str) -> AsyncIterator[Guest]:
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", script),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    guest = Guest(VMMS[0], PLACE, process)
    try:
        yield guest
    finally:
        await guest.end()


async def test_a_guest_answers_what_it_is_asked() -> None:
    async with guest_that_runs(f"echo noise; {AGENT}") as guest:
        assert await guest.ask("echo one; n=5") == "noise\none\n"
        assert await guest.ask("echo $n") == "5\n"
        assert await guest.ask("cat >/dev/null </dev/null & pid=$!") == ""


async def test_a_guest_that_ends_is_an_error_with_what_it_said() -> None:
    async with guest_that_runs("echo last words; read -r line") as guest:
        with pytest.raises(RuntimeError, match=r"(?s)vdev, PCI ended.*last words"):
            await guest.ask("true")


async def test_a_guest_that_is_gone_is_said_to_be() -> None:
    """Not that it cannot be stopped."""
    async with guest_that_runs("read -r line") as guest:
        with pytest.raises(RuntimeError, match="vdev, PCI ended"):
            async with guest.awake():
                await guest.ask("true")


async def test_a_guest_stands_still_but_for_its_windows() -> None:
    def stands_still() -> bool:
        return os.waitid(os.P_PID, guest.pid, os.WSTOPPED) is not None

    async with guest_that_runs(AGENT) as guest:
        await guest.ask("true")
        guest.stop()
        assert stands_still()
        async with guest.awake():
            assert await guest.ask("echo awake") == "awake\n"
        assert stands_still()


@pytest.mark.parametrize("vmm", VMMS, ids=[vmm.name for vmm in VMMS])
def test_the_same_guest_on_each(vmm: type) -> None:
    command = vmm.command(KERNEL, PLACE)  # type: ignore[attr-defined]
    words = " ".join(command)
    for part in ("/vmlinux", "/initrd", "/root.img", "/data.img", "tap9", "256"):
        assert part in words
    assert ("end=reboot" in words) == (command[0] == "qemu-system-x86_64")


def test_figures_of_a_window() -> None:
    before, after = Sample(10.0, 1000, 1.0, 50.0, {}), Sample(12.0, 3000, 1.5, 1050.0, {})
    assert figures_of(LOADS[0], before, after) == {
        "4 KiB reads a second": 500.0,
        "exits a 4 KiB read": 2.0,
        "VMM's CPU a 4 KiB read (µs)": 500.0,
    }
    with pytest.raises(ValueError, match=r"no 4 KiB read within 2\.0 s"):
        figures_of(LOADS[0], before, after._replace(done=50.0))


def test_whose_turn_it_is_first() -> None:
    guests = [object(), object(), object()]
    assert [turned(guests, number)[0] for number in range(4)] == [*guests, guests[0]]  # type: ignore[arg-type]
    assert all(set(turned(guests, number)) == set(guests) for number in range(4))  # type: ignore[arg-type]


def test_what_lies_beyond_the_noise() -> None:
    assert compared([2.0, 2.1, 1.9, 2.0, 2.2], [1.0] * 5) == "2.00 (1.90 to 2.20)"
    assert compared([2.0, 0.5, 1.1, 0.9, 1.0], [1.0] * 5).endswith("within noise")
    assert compared([3.0], [2.0]) == "1.50"
    # Nothing has no ratio to anything.
    assert compared([0.0, 0.0], [0.0, 1.0]) == "-"


async def test_the_table() -> None:
    figures: Figures = {}
    for number, vmm in enumerate(VMMS):
        async with guest_that_runs("true") as guest:
            guest.vmm = vmm
            for value in (1.0, 2.0, 6.0):
                add(figures, "a figure", guest, (number + 1) * value)
            if number:
                add(figures, "once", guest, 5.0)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table_of(figures))
    said = console.export_text()
    for part in ("vdev, PCI / QEMU q35", "1 to 6", "4 to 24", "0.50", "0.75", "1.00", "-"):
        assert part in said
