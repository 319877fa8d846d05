"""Talking to a running machine, and opening things for it.

A machine that is confined opens nothing.  What its user wants it to have is opened here, with the
user's rights, and passed along: an image, a wired tap, a connection, the files of a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vdev.blk.image import open_image
from vdev.errors import UserError
from vdev.server.control import find_machine, open_stream, request
from vdev.tables import encode
from vdev.vmm.config import DiskConfig, NicConfig

_LONG = 60.0


class MachineClient:
    """The machine `name`, which may also be a process id or the path of a control socket.

    Every method blocks, and raises UserError where the machine refuses or does not answer.
    """

    def __init__(self, name: str) -> None:
        path = find_machine(name) if "/" not in name else Path(name)
        if path is None:
            raise UserError(f"machine {name!r} does not run: see vdev vm list")
        self.name = name
        self.path = path

    def ask(
        self,
        command: str,
        *,
        patience: float | None = _LONG,
        fds: Mapping[str, int] | None = None,
        **arguments: Any,
    ) -> Any:
        """As `vdev.server.control.request`."""
        with self._explained():
            return request(self.path, command, patience=patience, fds=fds, **arguments)

    def stream(self, command: str, **arguments: Any) -> socket.socket:
        """As `vdev.server.control.open_stream`."""
        with self._explained():
            return open_stream(self.path, command, **arguments)

    def add_disk(self, disk: DiskConfig) -> str:
        """Plugs in a disk, whose path may be relative to our directory; returns its id."""
        if disk.path.startswith("null:"):
            return self._plug("disk", disk, {})
        disk = dataclasses.replace(disk, path=os.path.abspath(disk.path))
        if not self._is_confined():
            return self._plug("disk", disk, {})
        image = open_image(disk.path, read_only=disk.read_only, cache=disk.cache)
        try:
            return self._plug("disk", disk, {"image": image.fd})
        finally:
            image.close()

    def add_nic(self, nic: NicConfig) -> str:
        """Plugs in a network card; returns its id."""
        if nic.socket is not None:
            nic = dataclasses.replace(nic, socket=os.path.abspath(nic.socket))
        if not self._is_confined():
            return self._plug("nic", nic, {})
        if nic.socket is None:
            return asyncio.run(self._add_wired(nic))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(nic.socket)
            except OSError as error:
                raise UserError(f"network card: {nic.socket}: {error.strerror}") from None
            return self._plug("nic", nic, {"socket": sock.fileno()})

    async def _add_wired(self, nic: NicConfig) -> str:
        from vdev.net.wiring import Wiring

        wiring = Wiring(
            tap=nic.tap, bridge=nic.bridge, queues=nic.queues, mtu=nic.mtu, address=nic.address
        )
        try:
            await wiring.up()
            nic = dataclasses.replace(nic, mtu=wiring.mtu)
            id = self._plug("nic", nic, wiring.opened())
        except BaseException:
            await wiring.down()
            raise
        wiring.let_go()
        return id

    def remove(self, device: str) -> None:
        """Unplugs a device; returns when the guest has let go of it."""
        self.ask("remove", device=device)
        if self._is_confined():
            from vdev.net.wiring import sweep

            # What was made for it here is nobody's now.
            asyncio.run(sweep())

    def snapshot(self, directory: str, *, base: str | None = None, track: bool = False) -> None:
        """Writes a snapshot into a new directory; takes as long as it takes.

        base, track: see `VirtualMachine.snapshot`.
        """
        from vdev.vmm.snapshot_files import MEMORY, copy_file, file_names
        from vdev.vmm.snapshot_writer import Folder

        arguments: dict[str, Any] = {
            "directory": os.path.abspath(directory),
            "base": os.path.abspath(base) if base is not None else None,
            "track": track,
        }
        if not self._is_confined():
            self.ask("snapshot", patience=None, **arguments)
            return
        images = {
            device["id"]: device["image"]
            for device in self.ask("info")["devices"]
            if "image" in device
        }
        disks = [
            id for id, image in images.items() if image["kind"] == "file" and not image["read_only"]
        ]
        with Folder(directory) as folder:
            files = {name: folder.file(name) for name in file_names(disks)}
            if base is not None:
                try:
                    with open(Path(base, MEMORY), "rb") as memory:
                        copy_file(memory.fileno(), files[MEMORY])
                except OSError as error:
                    raise UserError(f"{base}: {error.strerror or error}") from None
            self.ask("snapshot", patience=None, fds=files, **arguments)

    def _plug(self, kind: str, config: DiskConfig | NicConfig, fds: Mapping[str, int]) -> str:
        table: dict[str, Any] = {kind: encode(config)}
        id: str = self.ask(f"add-{kind}", fds=fds, **table)["id"]
        return id

    def _is_confined(self) -> bool:
        return self.ask("info").get("sandbox") is not None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"machine {self.name}: no answer ({error.strerror or error})") from None
