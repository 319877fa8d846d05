"""``make demo``: a stock Debian guest whose root disk, data disk and NIC one vdev process serves.

Boots it, writes and verifies data, measures disk and network, prints one table, and leaves
JSON beside it. Exits with 1 when a step failed, 130 after Ctrl-C; nothing is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import host, initrd, kernel, network, rootfs
from .fio import random, verify
from .iperf import iperf, ping
from .lab import Lab
from .process import ProcessError
from .qemu import Guest, GuestError
from .report import Report

_DATA_SIZE = 1 << 30
_VERIFY_MIB = 256
_SECONDS = 5
_PINGS = 50


async def demonstrate(console: Console, report: Report) -> None:
    """Run every step and note its result in the report."""
    with _step(console, "the guest's kernel (Debian's package, kept in the cache)"):
        await initrd.build(await kernel.fetch())
    with _step(console, "the guest's root file system (mmdebstrap, kept in the cache)"):
        await rootfs.build()
    async with contextlib.AsyncExitStack() as stack:
        lab = await stack.enter_async_context(Lab())
        root = lab.blk("root", await lab.root_image(), serial="vdev-root")
        data = lab.blk("data", lab.blank("data", _DATA_SIZE), queues=2, serial="vdev-data")
        wire = await lab.network()
        nic = lab.net("net0", wire)
        what = f"one vdev process: root disk, data disk, NIC on bridge {wire.bridge}"
        with _step(console, what):
            await stack.enter_async_context(lab.serving(root, data, nic))
        accelerator = host.accelerator()
        with _step(
            console, f"boot Linux {lab.kernel_release} from the served disk ({accelerator})"
        ):
            guest = await stack.enter_async_context(lab.boot([root, data], [nic]))
        report.machine = {
            "guest kernel": lab.kernel_release,
            "accelerator": accelerator,
            "host cpus": str(os.cpu_count()),
            "guest's root": (await guest.run("findmnt -no SOURCE,FSTYPE /")).output.strip(),
        }
        await _disk(console, guest, report)
        await _wire(console, guest, report, wire, lab.directory)
        with _step(console, "guest off, server stopped, bridge and taps removed"):
            await guest.shutdown()
            await stack.aclose()
            if wire.bridge in await network.interfaces():
                raise ProcessError(f"the bridge {wire.bridge} was left behind")


async def _disk(console: Console, guest: Guest, report: Report) -> None:
    with _step(console, f"fio: write {_VERIFY_MIB} MiB, read back, verify crc32c"):
        report.block["fio verify"] = await verify(guest, "/dev/vdb", _VERIFY_MIB)
    for rw in ("randread", "randwrite"):
        with _step(console, f"fio: {rw} 4 KiB, 32 in flight, {_SECONDS} s"):
            report.block[f"fio {rw} 4k"] = await random(
                guest, "/dev/vdb", rw=rw, seconds=_SECONDS, mib=_VERIFY_MIB
            )


async def _wire(
    console: Console, guest: Guest, report: Report, wire: network.Network, directory: Path
) -> None:
    with _step(console, f"ping the host at {wire.host}"):
        report.ping = await ping(guest, wire.host, _PINGS)
    for name, reverse in (("guest → host", False), ("host → guest", True)):
        with _step(console, f"iperf3 {name}, {_SECONDS} s"):
            report.network[f"iperf3 {name}"] = await iperf(
                guest, wire.host, directory, seconds=_SECONDS, reverse=reverse
            )


@contextlib.contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Show what is being done, then that and how long it took."""
    start = time.monotonic()
    try:
        with console.status(escape(what)):
            yield
    except BaseException:
        console.print(f"[red]✗[/] {escape(what)}", highlight=False)
        raise
    took = time.monotonic() - start
    console.print(f"[green]✓[/] {escape(what)} [dim]{took:.1f} s[/]", highlight=False)


def _cancel_once(task: asyncio.Task[int]) -> None:
    """Let Ctrl-C and its kin end the demo in order; once that has begun, further ones wait."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def cancel() -> None:
        for number in numbers:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, cancel)


async def _main(console: Console, output: Path) -> int:
    task = asyncio.current_task()
    assert task
    _cancel_once(task)
    report = Report()
    try:
        await demonstrate(console, report)
    except (GuestError, ProcessError, ValueError, OSError) as error:
        console.print(f"[red]demo:[/] {escape(str(error))}", highlight=False)
        return 1
    report.write(output)
    report.show(console)
    console.print(f"The same as JSON: {output}", highlight=False)
    for failure in report.failures:
        console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
    return 1 if report.failures else 0


def main() -> int:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo/demo-results.json"))
    output: Path = parser.parse_args().output
    console = Console()
    if not console.is_terminal:
        console.width = 100
    lacks = host.lacks_guest() or host.lacks_network()
    if lacks:
        console.print(f"demo: {lacks}")
        return 2
    try:
        return asyncio.run(_main(console, output))
    except asyncio.CancelledError:
        console.print("demo: interrupted; guest, server, bridge and files are gone")
        return 130


if __name__ == "__main__":
    sys.exit(main())
