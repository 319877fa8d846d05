"""``vdev switch VERB``: serving a virtual switch, and asking one that runs."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vdev.cli import EXIT_FAILED, EXIT_OK
from vdev.cli.asking import ask, path_of
from vdev.cli.console import console_for
from vdev.cli.serve import run_on_loop
from vdev.errors import UserError
from vdev.net.fabric import PortSettings
from vdev.server.control import find_servers, request
from vdev.server.switch_config import GuestConfig, PortConfig, SwitchConfig
from vdev.tables import decode, option_table
from vdev.toml import read_toml
from vdev.units import format_size


def serve(arguments: Namespace) -> int:
    """``vdev switch serve``."""
    from vdev.server.switch_service import SwitchService

    config = _config(arguments)

    async def work() -> None:
        await SwitchService(config).run()

    return run_on_loop(arguments.loop, work)


def _config(arguments: Namespace) -> SwitchConfig:
    given: dict[str, Any] = {
        key: value
        for key in ("name", "stations", "age", "poll_us")
        if (value := getattr(arguments, key)) is not None
    }
    for key in ("socket_path", "control"):
        if (path := getattr(arguments, key)) is not None:
            given[key.removesuffix("_path")] = os.path.abspath(path)
    ports = [option_table(PortConfig, text, "name", "--port: ") for text in arguments.port]
    if arguments.guests is not None:
        given["guests"] = option_table(GuestConfig, arguments.guests, None, "--guests: ")
    if arguments.config is None:
        if arguments.name is None:
            raise UserError("give the switch a name, or a --config FILE that describes it")
        return decode(SwitchConfig, {**given, "port": ports}, "")
    path = Path(arguments.config)
    tables = {"name": path.stem, **read_toml(arguments.config), **given}
    if ports:
        raise UserError(f"{path} describes the whole switch: --port belongs into it")
    return decode(SwitchConfig, tables, f"{path}: ", path.resolve().parent)


def list_switches(arguments: Namespace) -> int:
    """``vdev switch list``."""
    switches = []
    for path in find_servers():
        # One that ends this moment is none.
        with contextlib.suppress(OSError, UserError):
            status = request(path, "status")
            if "switch" in status:
                count = len(status["devices"])
                switches.append({"pid": status["pid"], **status["switch"], "ports": count})
    if arguments.json:
        print(json.dumps(switches, indent=2))
    for switch in () if arguments.json else switches:
        print(f"{switch['name']}  pid {switch['pid']}  {switch['ports']} ports  {switch['socket']}")
    return EXIT_OK if switches else EXIT_FAILED


def ports(arguments: Namespace) -> int:
    """``vdev switch ports``."""
    found = ask(path_of(arguments.switch), "status")["devices"]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return EXIT_OK
    table = Table()
    for words in ("port", "where", "state", "vlan", "settings"):
        table.add_column(words, overflow="fold")
    for number in ("frames in", "bytes in", "frames out", "bytes out", "dropped"):
        table.add_column(number, justify="right")
    for port in found:
        counters = port["counters"]
        table.add_row(
            port["name"],
            Text(f"tap {port['tap']}" if "tap" in port else port["socket"]),
            port["state"] if port.get("link_up", True) else "link down",
            _vlans(port["settings"]),
            _settings(port["settings"]),
            f"{counters['in_frames']:,}",
            format_size(counters["in_bytes"]),
            f"{counters['out_frames']:,}",
            format_size(counters["out_bytes"]),
            _drops(counters),
        )
    console_for().print(table)
    return EXIT_OK


def _vlans(settings: dict[str, Any]) -> str:
    untagged = str(settings["vlan"]) if settings["vlan"] else "-"
    return f"{untagged}, tagged {settings['trunk']}" if settings["trunk"] else untagged


def _settings(settings: dict[str, Any]) -> str:
    """What differs from the defaults."""
    plain = asdict(PortSettings())
    return ", ".join(
        key if value is True else f"{key}={value}"
        for key, value in settings.items()
        if key not in ("vlan", "trunk") and value != plain[key]
    )


def _drops(counters: dict[str, int]) -> str:
    drops = {
        key.removeprefix("drop_").replace("_", " "): value
        for key, value in counters.items()
        if key.startswith("drop_") and value
    }
    return ", ".join(f"{value:,} {key}" for key, value in drops.items()) or "0"


def table(arguments: Namespace) -> int:
    """``vdev switch table``."""
    stations = ask(path_of(arguments.switch), "table")
    if arguments.json:
        print(json.dumps(stations, indent=2))
        return EXIT_OK
    shown = Table()
    for words in ("address", "vlan", "port", "age"):
        shown.add_column(words)
    for station in sorted(stations, key=lambda s: (s["vlan"], s["mac"])):
        age = "bound" if station["bound"] else f"{station['age']} s"
        shown.add_row(station["mac"], str(station["vlan"]), station["port"], age)
    console_for().print(shown)
    return EXIT_OK


def add(arguments: Namespace) -> int:
    """``vdev switch add``."""
    port = option_table(PortConfig, arguments.port, "name", "port: ")
    if isinstance(socket := port.get("socket"), str):
        port["socket"] = os.path.abspath(socket)
    ask(path_of(arguments.switch), "add", port=port)
    return EXIT_OK


def change(arguments: Namespace) -> int:
    """``vdev switch set``."""
    settings = option_table(PortSettings, arguments.settings, None, "settings: ")
    ask(path_of(arguments.switch), "set", port=arguments.port, settings=settings)
    return EXIT_OK


def remove(arguments: Namespace) -> int:
    """``vdev switch remove``."""
    ask(path_of(arguments.switch), "remove", port=arguments.port)
    return EXIT_OK
