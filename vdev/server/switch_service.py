"""A switch as a program: until a signal or a command ends it, asked over a control socket.

{"command": "table"}                                        every station that it knows
{"command": "add", "port": {"name": "db", "socket": "/s"}}  the fields of `PortConfig`
{"command": "set", "port": "db", "settings": {"vlan": 10}}  those of `PortSettings`
{"command": "remove", "port": "db"}
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict
from typing import Any

import vdev
from vdev.errors import UserError
from vdev.net.fabric import PortSettings
from vdev.server.control import Handler, Request, default_path, find_machine
from vdev.server.notify import notify
from vdev.server.service import controlled
from vdev.server.signals import on_signals
from vdev.server.switch import Switch
from vdev.server.switch_config import PortConfig, SwitchConfig
from vdev.tables import decode


class SwitchService:
    """Runs the switch that `config` describes."""

    def __init__(self, config: SwitchConfig) -> None:
        self._config = config
        self._switch = Switch(
            name=config.name,
            socket_path=config.socket_path,
            guests=config.guests,
            stations=config.stations,
            age=config.age,
            poll_us=config.poll_us,
        )
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT, SIGHUP or the command "stop". Raises UserError."""
        config = self._config
        default_path()  # makes the directory of the sockets
        if (other := find_machine(config.name)) is not None:
            raise UserError(f"switch {config.name}: one of that name runs already ({other})")
        with on_signals(self._stop.set):
            async with self._switch:
                for port in config.ports:
                    await self._switch.add(port)
                control = config.control or True
                async with controlled(control, self._handlers(), config.name):
                    notify("READY=1")
                    await self._stop.wait()
                    notify("STOPPING=1")

    def _handlers(self) -> dict[str, Handler]:
        return {
            "status": self.status,
            "stop": self.stop,
            "link": self.link,
            "table": self.table,
            "add": self.add,
            "set": self.set,
            "remove": self.remove,
        }

    async def status(self, _request: Request) -> dict[str, Any]:
        """The command "status": as of a server, whose devices are the ports."""
        config, thread = self._config, self._switch.iothread
        return {
            "pid": os.getpid(),
            "version": vdev.__version__,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "iothreads": [{"tid": thread.tid, "io_uring": thread.has_io_uring, **thread.stats()}],
            "switch": {
                "name": config.name,
                "socket": config.socket_path,
                "stations": config.stations,
                "age": config.age,
                "guests": asdict(config.guests),
            },
            "devices": self._switch.ports(),
        }

    async def stop(self, _request: Request) -> None:
        """The command "stop": as SIGTERM does."""
        self._stop.set()

    async def link(self, request: Request) -> dict[str, bool]:
        """The command "link": {"device": a port's name, "up": whether its cable is plugged in}."""
        up = request.get("up")
        if not isinstance(up, bool):
            raise UserError(f"up {up!r}: true or false")
        self._switch.set_link(_text(request, "device"), up)
        return {"up": up}

    async def table(self, _request: Request) -> list[dict[str, Any]]:
        """The command "table"."""
        return await self._switch.table()

    async def add(self, request: Request) -> None:
        """The command "add"."""
        await self._switch.add(decode(PortConfig, request.get("port"), "port: "))

    async def set(self, request: Request) -> None:
        """The command "set": what is not named stays as it is."""
        name, settings = _text(request, "port"), request.get("settings")
        if not isinstance(settings, dict):
            raise UserError(f"settings {settings!r}: a table")
        present = asdict(self._switch.settings(name))
        changed = decode(PortSettings, {**present, **settings}, f"port {name}: ")
        await self._switch.change_port(name, changed)

    async def remove(self, request: Request) -> None:
        """The command "remove"."""
        await self._switch.remove_port(_text(request, "port"))


def _text(request: Request, key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key} {value!r}: the name of a port")
    return value
