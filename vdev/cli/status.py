"""``vdev status``, ``resize``, ``link`` and ``stop``: talking to servers that run."""

from __future__ import annotations

import contextlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vdev.cli import EXIT_FAILED, EXIT_OK
from vdev.cli.asking import ask, path_of
from vdev.cli.console import console_for
from vdev.runtime import runtime_dir
from vdev.server.control import find_servers, request
from vdev.units import format_size

Status = dict[str, Any]

_WORK = {"blk": "completions", "net": "packets"}


def status(arguments: Namespace) -> int:
    """``vdev status``."""
    if arguments.watch is None:
        return _once(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        _watch(arguments)
    return EXIT_OK


def resize(arguments: Namespace) -> int:
    """``vdev resize``."""
    result = ask(path_of(arguments.server), "resize", device=arguments.device, size=arguments.size)
    print(f"{arguments.device}: {result['size']} bytes")
    return EXIT_OK


def link(arguments: Namespace) -> int:
    """``vdev link``."""
    up = arguments.state == "up"
    ask(path_of(arguments.server), "link", device=arguments.device, up=up)
    return EXIT_OK


def stop(arguments: Namespace) -> int:
    """``vdev stop``."""
    ask(path_of(arguments.server), "stop")
    return EXIT_OK


def _once(arguments: Namespace) -> int:
    servers = _collect(arguments.server)
    if arguments.json:
        print(json.dumps(servers, indent=2))
    elif servers:
        console = console_for()
        for server in servers:
            console.print(_table(server, None, 0.0))
    else:
        print(f"no server of this user runs (none has a socket in {runtime_dir()})")
    return EXIT_OK if servers else EXIT_FAILED


def _watch(arguments: Namespace) -> None:
    if arguments.json:
        for servers, _, _ in _samples(arguments):
            print(json.dumps(servers), flush=True)
        return
    with Live(console=console_for(), auto_refresh=False) as live:
        for servers, before, seconds in _samples(arguments):
            live.update(_tables(servers, before, seconds), refresh=True)


def _samples(arguments: Namespace) -> Iterator[tuple[list[Status], list[Status], float]]:
    """Endless: the status, the one before it, and the seconds between."""
    before: list[Status] = []
    then = time.monotonic()
    while True:
        servers, now = _collect(arguments.server), time.monotonic()
        yield servers, before, now - then
        before, then = servers, now
        time.sleep(arguments.watch)


def _collect(server: str | None) -> list[Status]:
    if server is not None:
        return [ask(path_of(server), "status")]
    found: list[Status] = []
    for path in find_servers():
        # One that ends this moment is none.
        with contextlib.suppress(OSError):
            found.append(request(path, "status"))
    return found


def _tables(servers: list[Status], before: list[Status], seconds: float) -> RenderableType:
    if not servers:
        return "no server runs"
    earlier = {server["pid"]: server for server in before}
    return Group(*(_table(server, earlier.get(server["pid"]), seconds) for server in servers))


def _table(server: Status, before: Status | None, seconds: float) -> Table:
    """One server; with an earlier status, rates over the ``seconds`` since, else totals."""
    uptime = time.strftime("%H:%M:%S", time.gmtime(server["uptime_s"]))
    rates = before is not None and seconds > 0
    table = Table(
        title=f"{_title(server)}, pid {server['pid']}, up {uptime}",
        title_justify="left",
    )
    per = "/s" if rates else ""
    for words in ("device", "socket", "serves", "state"):
        table.add_column(words, overflow="fold")
    numbers = (
        f"requests or packets{per}",
        f"to guest{per}",
        f"from guest{per}",
        "p50",
        "p99",
        "errors",
    )
    for number in numbers:
        table.add_column(number, justify="right")
    totals_before = (
        {d["name"]: d["stats"]["total"] for d in before["devices"] if d["stats"]} if before else {}
    )
    for device in server["devices"]:
        if device["stats"] is None:
            table.add_row(device["name"], Text(device["socket"]), device["kind"], device["state"])
            continue
        total = device["stats"]["total"]
        old = totals_before.get(device["name"]) if rates else None
        requests, to_guest, from_guest = (
            (total[name] - (old[name] if old else 0)) / (seconds if old else 1)
            for name in (_WORK.get(device["kind"], "completions"), "bytes_read", "bytes_written")
        )
        table.add_row(
            device["name"],
            Text(device["socket"]),
            Text(_serves(device)),
            device["state"],
            f"{requests:,.0f}",
            format_size(round(to_guest)),
            format_size(round(from_guest)),
            _microseconds(total["latency"], "p50"),
            _microseconds(total["latency"], "p99"),
            str(total["errors"] + total["breaks"]),
        )
    return table


def _title(server: Status) -> str:
    if machine := server.get("machine"):
        return f"machine {machine['name']} ({machine['state']}, {machine['vmm']})"
    if switch := server.get("switch"):
        return f"switch {switch['name']}"
    return f"vdev {server['version']}"


def _serves(device: Status) -> str:
    if image := device.get("image"):
        mode = "read-only" if image["read_only"] else image["cache"]
        return f"{image['path']} ({format_size(image['size'])}, {mode})"
    return f"tap {device['tap']}" if "tap" in device else device["kind"]


def _microseconds(latency: Status, quantile: str) -> str:
    return f"{latency[quantile] / 1000:.1f} µs" if latency["count"] else "-"
