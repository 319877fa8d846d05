"""Machines side by side: ``python -m perf.machines [ROUNDS]``, where KVM runs stock kernels.

On a host whose KVM does not: ``python -m tests.lab.kvm -- .venv/bin/python -m perf.machines``, in
an emulated machine, where only ratios mean something.  A guest on each VMM is booted once; all keep
a load up, and in each round each has one window in turn, in an order that turns with the rounds,
while the others stand still.  So a ratio compares windows seconds apart; what it says lies beyond
the noise where the interval of the rounds' ratios (perf.stats) does not reach 1.  Then exits by
reason, and restores of small and large machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from perf import exits
from perf.guests import VMMS, Guest, booted, command
from perf.stats import ratio
from tests.lab import innermost, rootfs
from vdev.vmm import snapshot as snapshots
from vdev.vmm.config import MachineConfig
from vdev.vmm.machine import Machine

MIB = 1 << 20
_ROUNDS, _RESTORES = 9, 3
_WARM, _WINDOW, _SETTLED, _IDLE = 0.3, 0.9, 1.0, 2.0
"""Seconds."""
_PAIRS = (("vdev, PCI", "QEMU q35"), ("vdev, MMIO", "QEMU microvm"))
_FIO = (
    "chroot /mnt fio --name=f --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=32 "
    "--bs=4k --rw=randread --time_based --runtime=9999 --thread"
)
_IPERF = "chroot /mnt iperf3 -t 9999"
_CARD = "/sys/class/net/eth0/statistics"


class Load(NamedTuple):
    """What a guest does, and how its progress shows.

    what, rate: what one is called, and so many a second.  unit: so much of the counter, the first
    number of a file of the guest's, is one.
    """

    what: str
    rate: str
    command: str
    counter: str
    unit: float
    start: float
    """So many units mean that it is under way."""


LOADS = (
    Load("4 KiB read", "4 KiB reads a second", _FIO, "/sys/block/vdb/stat", 1, 200),
    Load("Mbit sent", "TCP sent (Mbit/s)", f"{_IPERF} -c {{host}}", f"{_CARD}/tx_bytes", 125e3, 20),
    Load(
        *("Mbit received", "TCP received (Mbit/s)", f"{_IPERF} -R -c {{host}}"),
        *(f"{_CARD}/rx_bytes", 125e3, 20),
    ),
)


class Sample(NamedTuple):
    """At one moment: seconds, exits, CPU time in s, units done; exits by reason where counted."""

    seconds: float
    exits: int
    cpu: float
    done: float
    reasons: dict[str, int]


Figures = dict[str, dict[str, list[float]]]
"""Figure → VMM → a value a round."""


async def progress(guest: Guest, load: Load) -> float:
    """Units done so far."""
    said = await guest.ask(f"read -r n rest <{load.counter}; echo $n")
    return int(re.findall(r"\d+", said)[-1]) / load.unit


async def sample(guest: Guest, load: Load, reasons: dict[str, int] | None = None) -> Sample:
    done = await progress(guest, load)
    return Sample(
        *(time.monotonic(), exits.total(guest.pid), exits.cpu_seconds(guest.pid)),
        *(done, reasons or {}),
    )


async def window(guest: Guest, load: Load) -> tuple[Sample, Sample]:
    async with guest.awake():
        await asyncio.sleep(_WARM)
        before = await sample(guest, load)
        await asyncio.sleep(_WINDOW)
        return before, await sample(guest, load)


def figures_of(load: Load, before: Sample, after: Sample) -> dict[str, float]:
    """Name → value. Raises ValueError where nothing was done."""
    seconds, done = after.seconds - before.seconds, after.done - before.done
    if done <= 0:
        raise ValueError(f"no {load.what} within {seconds:.1f} s")
    return {
        load.rate: done / seconds,
        f"exits a {load.what}": (after.exits - before.exits) / done,
        f"VMM's CPU a {load.what} (µs)": 1e6 * (after.cpu - before.cpu) / done,
    }


@contextlib.asynccontextmanager
async def under(load: Load, guests: Sequence[Guest]) -> AsyncIterator[dict[str, int]]:
    """The load runs on all guests, which stand still; VMM → exits until it was under way."""
    started = {}
    for guest in guests:
        async with guest.awake():
            before = exits.total(guest.pid)
            start = int((await progress(guest, load) + load.start) * load.unit)
            words = load.command.format(host=guest.place.host)
            # It looks by itself: what it says costs exits.
            wait = f"until read -r n rest <{load.counter}; [ $n -gt {start} ]; do sleep 0.2; done"
            await guest.ask(f"{words} >/dev/null 2>&1 & pid=$!; {wait}")
            started[guest.vmm.name] = exits.total(guest.pid) - before
    yield started
    for guest in guests:
        async with guest.awake():
            await guest.ask("kill -9 $pid; wait $pid")


def turned(guests: Sequence[Guest], number: int) -> list[Guest]:
    at = number % len(guests)
    return [*guests[at:], *guests[:at]]


def add(figures: Figures, name: str, guest: Guest, value: float) -> None:
    figures.setdefault(name, {}).setdefault(guest.vmm.name, []).append(value)


async def measure(
    guests: Sequence[Guest],
    rounds: int,
    console: Console,
    figures: Figures,
    reasons: dict[str, Figures],
) -> None:
    """Adds all figures, and exits by reason a unit of each load."""
    for load in LOADS:
        async with under(load, guests) as started:
            for guest in guests:
                if load is LOADS[0]:
                    add(figures, "exits until fio reads", guest, started[guest.vmm.name])
            for number in range(rounds):
                for guest in turned(guests, number):
                    found = figures_of(load, *await window(guest, load))
                    for name, value in found.items():
                        add(figures, name, guest, value)
                    said = ", ".join(f"{name} {value:,.3g}" for name, value in found.items())
                    console.print(f"round {number + 1}: {guest.vmm.name}: {said}")
            for guest in guests:
                for name, value in (await why(guest, load)).items():
                    add(reasons.setdefault(load.what, {}), name, guest, value)
    for number in range(-(-rounds // 2)):
        for guest in turned(guests, number):
            for name, value in (await idle(guest)).items():
                add(figures, name, guest, value)


async def why(guest: Guest, load: Load) -> dict[str, float]:
    """Exits a unit by reason."""
    async with guest.awake():
        await asyncio.sleep(_WARM)
        with exits.counted() as count:
            before = await sample(guest, load, count())
            await asyncio.sleep(2 * _WINDOW)
            after = await sample(guest, load, count())
    done = after.done - before.done
    return {name: (after.reasons[name] - before.reasons[name]) / done for name in exits.REASONS}


async def idle(guest: Guest) -> dict[str, float]:
    """Of a guest that does nothing, while nobody asks it anything."""
    async with guest.awake():
        await guest.ask("true")
        await asyncio.sleep(_SETTLED)
        pid = guest.pid

        def now() -> tuple[float, int, float, float]:
            return (
                *(time.monotonic(), exits.total(pid)),
                *(exits.cpu_seconds(pid), exits.cpu_seconds(pid, vcpus=False)),
            )

        before = now()
        await asyncio.sleep(_IDLE)
        seconds, exited, cpu, own = (b - a for a, b in zip(before, now(), strict=True))
    return {
        "idle: exits a second": exited / seconds,
        "idle: CPU (%)": 100 * cpu / seconds,
        "idle: CPU beside its vCPU (%)": 100 * own / seconds,
    }


def table_of(figures: Figures) -> Table:
    """Medians and ranges of the rounds, and ratios with their intervals."""
    table = Table("", *(vmm.name for vmm in VMMS), *(f"{a} / {b}" for a, b in _PAIRS))
    for name, values in figures.items():
        cells = []
        for vmm in VMMS:
            found = values.get(vmm.name, [])
            cells.append(f"{statistics.median(found):,.3g}" if found else "-")
            if len(found) > 1:
                cells[-1] += f"\n{min(found):,.3g} to {max(found):,.3g}"
        table.add_row(
            name, *cells, *(compared(values.get(a, []), values.get(b, [])) for a, b in _PAIRS)
        )
    return table


def compared(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The ratio and its interval; of one round alone only the ratio."""
    both = min(len(ours), len(theirs))
    if not both or not all(theirs):
        return "-"
    found = ratio(ours[:both], theirs[:both])
    if found.count == 1:
        return f"{found.value:.2f}"
    noise = "\nwithin noise" if found.low <= 1 <= found.high else ""
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}){noise}"


async def compare(rounds: int, console: Console) -> None:
    """Boots, disk, net and idling."""
    material = await innermost.prepare()
    tools = await rootfs.build()
    with tempfile.TemporaryDirectory() as place:
        data = _data(Path(place, "data.img"))
        async with booted(VMMS, material.cloud, tools, data) as guests:
            figures: Figures = {}
            reasons: dict[str, Figures] = {}
            for guest in guests:
                add(figures, "kernel's clock at /init (s)", guest, guest.init)
                add(figures, "exits until it is ready", guest, exits.total(guest.pid))
            try:
                await measure(guests, rounds, console, figures, reasons)
            finally:
                # What there is, where an emulated machine has ended a guest.
                console.print(table_of(figures))
                for what, found in reasons.items():
                    console.print(table_of_reasons(what, found))


def table_of_reasons(what: str, found: Figures) -> Table:
    table = Table(f"exits a {what}", *(vmm.name for vmm in VMMS))
    for reason in exits.REASONS:
        values = [found[reason].get(vmm.name) for vmm in VMMS]
        table.add_row(reason, *(f"{value[0]:.3f}" if value else "-" for value in values))
    return table


def _data(path: Path) -> Path:
    path.write_bytes(os.urandom(64 * MIB))
    return path


async def restore(rounds: int, console: Console) -> None:
    """How long until a restored machine runs, by the size of its memory."""
    material = await innermost.prepare()
    times: dict[int, list[float]] = {256 * MIB: [], 2048 * MIB: []}
    with tempfile.TemporaryDirectory() as place:
        for size in times:
            config = MachineConfig(
                name="perf",
                kernel=str(material.cloud.vmlinux),
                initrd=str(material.cloud.initrd),
                cmdline="console=ttyS0 quiet " + innermost.script("while :; do echo tick; done"),
                memory=size,
            )
            async with Machine(config) as machine:
                await machine.start()
                async for chunk in machine.console.attach():
                    if b"tick" in chunk:
                        break
                await machine.snapshot(f"{place}/{size}")
        for _ in range(rounds):
            for size, taken in times.items():
                began = time.monotonic()
                snapshot = snapshots.read(f"{place}/{size}")
                async with Machine(snapshots.config_of(snapshot), snapshot) as machine:
                    await machine.start()
                    taken.append(time.monotonic() - began)
    small, large = (statistics.median(taken) for taken in times.values())
    found = compared(times[2048 * MIB], times[256 * MIB]).replace("\n", ", ")
    console.print(
        f"restore: 256 MiB {1e3 * small:.0f} ms, 2 GiB {1e3 * large:.0f} ms, ratio {found}"
    )


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    console = Console(width=150, highlight=False)
    places = {"debugfs": exits.KVM.parent, "tracefs": exits.EVENTS.parents[1]}
    unmounted = [(kind, place) for kind, place in places.items() if not place.is_mount()]

    async def everything() -> None:
        for kind, place in unmounted:
            await command(f"mount -t {kind} {kind} {place}")
        await compare(rounds, console)
        await restore(_RESTORES, console)

    asyncio.run(everything())
    return 0


if __name__ == "__main__":
    sys.exit(main())
