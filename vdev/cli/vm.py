"""``vdev vm VERB NAME``: talking to machines that run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from argparse import Namespace
from typing import Any

from vdev.cli import EXIT_FAILED, EXIT_OK
from vdev.errors import UserError
from vdev.machines.client import MachineClient
from vdev.server.control import find_servers, request
from vdev.tables import parse_options
from vdev.units import format_size, parse_size
from vdev.vmm.config import DiskConfig, NicConfig

_READ = 4096


def plain(arguments: Namespace) -> int:
    """pause, resume, power-button, reset."""
    MachineClient(arguments.name).ask(arguments.verb)
    return EXIT_OK


def show(arguments: Namespace) -> int:
    """info, counters: JSON is what they are."""
    print(json.dumps(MachineClient(arguments.name).ask(arguments.verb), indent=2))
    return EXIT_OK


def stop(arguments: Namespace) -> int:
    """Returns when the machine has ended."""
    with MachineClient(arguments.name).stream("stop") as sock:
        sock.settimeout(None)
        while sock.recv(_READ):
            pass
    return EXIT_OK


def list_machines(arguments: Namespace) -> int:
    """``vdev vm list``."""
    machines = []
    for path in find_servers():
        # One that ends this moment is none; a server of devices has no such command.
        with contextlib.suppress(OSError, UserError):
            machines.append({"pid": int(path.stem.rpartition(".")[2]), **request(path, "info")})
    if arguments.json:
        print(json.dumps(machines, indent=2))
    for machine in () if arguments.json else machines:
        print(
            f"{machine['name']}  pid {machine['pid']}  {machine['vmm']}  {machine['state']}  "
            f"{machine['cpus']} CPU  {format_size(machine['memory'])}"
        )
    return EXIT_OK if machines else EXIT_FAILED


def add_disk(arguments: Namespace) -> int:
    """``vdev vm add-disk``."""
    disk = parse_options(DiskConfig, arguments.disk, "path", "disk: ")
    print(MachineClient(arguments.name).add_disk(disk))
    return EXIT_OK


def add_nic(arguments: Namespace) -> int:
    """``vdev vm add-nic``."""
    nic = parse_options(NicConfig, arguments.nic, None, "network card: ")
    print(MachineClient(arguments.name).add_nic(nic))
    return EXIT_OK


def remove(arguments: Namespace) -> int:
    """``vdev vm remove``."""
    MachineClient(arguments.name).remove(arguments.device)
    return EXIT_OK


def link(arguments: Namespace) -> int:
    """``vdev vm link``."""
    client = MachineClient(arguments.name)
    client.ask("link", device=arguments.device, up=arguments.state == "up")
    return EXIT_OK


def balloon(arguments: Namespace) -> int:
    """``vdev vm balloon``."""
    MachineClient(arguments.name).ask("balloon", size=parse_size(arguments.size))
    return EXIT_OK


def snapshot(arguments: Namespace) -> int:
    """``vdev vm snapshot``."""
    client = MachineClient(arguments.name)
    client.snapshot(arguments.directory, base=arguments.base, track=arguments.track)
    return EXIT_OK


def console(arguments: Namespace) -> int:
    """``vdev vm console``: until the escape, or the machine's end."""
    from vdev.cli.terminal import Terminal, parse_escape

    escape = parse_escape(arguments.escape)
    machine = MachineClient(arguments.name)

    def resized(columns: int, rows: int) -> None:
        with contextlib.suppress(OSError, UserError):
            request(machine.path, "window", patience=1, columns=columns, rows=rows)

    async def converse() -> None:
        sock = machine.stream("console", history=not arguments.no_history)
        reader, writer = await asyncio.open_unix_connection(sock=sock)

        async def output() -> Any:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(_READ):
                    yield data

        async def write(data: bytes) -> None:
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()

        try:
            terminal = Terminal(escape, resized)
            if terminal.is_tty and escape is not None:
                print(
                    f"vdev: console of {arguments.name}; {arguments.escape} leaves", file=sys.stderr
                )
            await terminal.converse(output(), write)
        finally:
            writer.close()

    asyncio.run(converse())
    return EXIT_OK
