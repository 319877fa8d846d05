"""vdev as it is installed, or from another build by ``--server NAME=vdev:COMMAND``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from perf import installed
from perf.model import Disk, Launch, Port, Server

BRIDGE = "perf0"


class Vdev(Server):
    """One disk by ``vdev blk serve``, anything more by ``vdev serve``.

    `command`: None = as installed. `poll_us`: an iothread's longest polling, None = the default.
    """

    def __init__(
        self, name: str, command: Sequence[str] | None = None, poll_us: int | None = None
    ) -> None:
        self.name = name
        self._command = command
        self._poll_us = poll_us

    def with_command(self, name: str, command: Sequence[str]) -> Server:
        return Vdev(name, command, self._poll_us)

    def _start(self) -> tuple[Sequence[str], Mapping[str, str]]:
        if self._command is not None:
            return self._command, {}
        found = installed.find()
        return found.command, found.environment

    def version(self) -> str:
        command, environment = self._start()
        done = subprocess.run(
            [*command, "--version"],
            env=environment or None,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        if len(disks) > 1:
            return self._serve("blk", [_disk(disk) for disk in disks], directory)
        settings = _disk(disks[0])
        names = {"socket": "socket-path", "image": "blk-file", "queues": "num-queues"}
        options = [f"--{names.get(key, key)}={value}" for key, value in settings.items()]
        if self._poll_us is not None:
            options.append(f"--poll-us={self._poll_us}")
        command, environment = self._start()
        return Launch([*command, "blk", "serve", *options], environment)

    def net(self, ports: Sequence[Port], directory: Path) -> Launch:
        tables: list[Settings] = [
            {
                "socket": str(port.socket),
                "bridge": BRIDGE,
                "mac": port.mac,
                "queues": port.pairs,
                "mtu": port.mtu,
            }
            for port in ports
        ]
        return replace(self._serve("net", tables, directory), own_network=True)

    def _serve(self, kind: str, devices: Sequence[Settings], directory: Path) -> Launch:
        tables = [] if self._poll_us is None else [_table("[server]", {"poll_us": self._poll_us})]
        tables += [_table(f"[[{kind}]]", settings) for settings in devices]
        config = directory / "vdev.toml"
        config.write_text("\n".join(tables))
        command, environment = self._start()
        return Launch([*command, "serve", str(config)], environment)


class VdevSwitch(Vdev):
    """Cards in the ports of one ``vdev switch serve``."""

    def with_command(self, name: str, command: Sequence[str]) -> Server:
        return VdevSwitch(name, command, self._poll_us)

    def net(self, ports: Sequence[Port], directory: Path) -> Launch:
        options = [] if self._poll_us is None else [f"--poll-us={self._poll_us}"]
        for number, port in enumerate(ports):
            settings = f"socket={port.socket},mac={port.mac},queues={port.pairs},mtu={port.mtu}"
            options.append(f"--port=port{number},{settings}")
        options += [f"--socket-path={directory / 'switch'}", f"--control={directory / 'control'}"]
        command, environment = self._start()
        return Launch([*command, "switch", "serve", "perf", *options], environment)


Settings = Mapping[str, str | int]


def _disk(disk: Disk) -> Settings:
    return {
        "socket": str(disk.socket),
        "image": str(disk.file) if disk.file else f"null:{disk.size}",
        "cache": "none" if disk.direct else "writeback",
        "queues": disk.queues,
    }


def _table(head: str, settings: Settings) -> str:
    # JSON's strings and numbers are TOML's.
    return "\n".join((head, *(f"{key} = {json.dumps(value)}" for key, value in settings.items())))


SERVERS = [
    Vdev("vdev"),
    Vdev("vdev-no-poll", poll_us=0),
    VdevSwitch("vdev-switch"),
    # The same, told apart by how the suite "rings" speaks to them.
    *(
        Vdev(f"vdev-{manner}")
        for manner in (
            *("packed", "in-order", "packed-in-order"),
            *("inflight", "packed-inflight", "logged", "packed-logged"),
        )
    ),
]
