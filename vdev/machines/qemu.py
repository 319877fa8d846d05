"""A machine on QEMU, its disks and network cards served by this process over vhost-user.

Monitor and console are connected sockets that QEMU inherits; a device's socket has a path (QEMU
takes cards on no other), in a private folder that is gone as soon as QEMU has connected.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from vdev.errors import UserError
from vdev.machines.foreign import ForeignMachine, cancel
from vdev.machines.monitor import Monitor
from vdev.machines.plugged import DeviceSet, Plugged
from vdev.machines.qemu_command import (
    PORTS_MAX,
    PROGRAM,
    SPARE_PORTS,
    Part,
    QemuParts,
    machine_command,
    part_arguments,
    plugged,
)
from vdev.vmm.api import End, Outcome, State
from vdev.vmm.config import MachineConfig
from vdev.vmm.host import kvm_usable

_ENDS = {
    "guest-shutdown": Outcome(End.SHUTDOWN),
    "guest-reset": Outcome(End.RESET_REFUSED, "the guest wanted a reset (or had a triple fault)"),
    "guest-panic": Outcome(End.PANIC, "the guest's kernel panicked"),
}


class QemuMachine(ForeignMachine[Part]):
    """A `VirtualMachine` on QEMU."""

    vmm = "qemu"
    title = "QEMU"

    def __init__(self, config: MachineConfig) -> None:
        super().__init__(config)
        self._refuse({}, (PROGRAM, "setpriv"), PORTS_MAX - SPARE_PORTS)
        self._kvm = kvm_usable() is None
        self.accelerator = "kvm" if self._kvm else "tcg"
        slots = len(tuple(config.devices())) + SPARE_PORTS
        self._ports = [f"port{number}" for number in range(slots)]
        self._devices = DeviceSet(config, self._ports, QemuParts(self._kvm))

    async def _launch(self) -> None:
        stack = self._stack
        console, qemu_console = self._socketpair()
        monitor, qemu_monitor = self._socketpair()
        command = machine_command(
            self.config,
            kvm=self._kvm,
            console_fd=qemu_console.fileno(),
            monitor_fd=qemu_monitor.fileno(),
            ports=self._ports,
        )
        for device in self._devices:
            command += part_arguments(device.part, device.port, device.address)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=console)
        stack.callback(self._writer.close)
        await self._spawn(
            command,
            [qemu_console, qemu_monitor],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        reading = asyncio.ensure_future(self._read_console())
        stack.push_async_callback(cancel, [reading])
        self._monitor = Monitor(monitor, self._on_event)
        stack.push_async_callback(self._monitor.close)
        try:
            await self._monitor.open()
        except UserError:
            raise await self._not_started() from None
        for device in self._devices:
            device.hide()
        self._watch()

    async def start(self) -> None:
        if self._state is not State.BUILT:
            raise UserError(f"machine {self.config.name}: it is {self._state.value}")
        await self._monitor.execute("cont")
        if self._state is State.BUILT:
            self._state = State.RUNNING

    async def pause(self) -> None:
        self._must_run()
        await self._monitor.execute("stop")

    async def resume(self) -> None:
        self._must_run()
        await self._monitor.execute("cont")

    async def power_button(self) -> None:
        self._must_run()
        await self._monitor.execute("system_powerdown")

    async def reset(self) -> None:
        self._must_run()
        await self._monitor.execute("system_reset")

    async def set_balloon(self, size: int) -> None:
        await self._monitor.execute("balloon", {"value": self._left_by(size)})

    async def _quit(self) -> None:
        await self._monitor.execute("quit")

    async def _console_input(self, data: bytes) -> None:
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def _plug(self, device: Plugged[Part]) -> None:
        part, execute = device.part, self._monitor.execute
        undo: list[tuple[str, str]] = []
        try:
            address = {"type": "unix", "data": {"path": device.address}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await execute("chardev-add", {"id": part.chardev, "backend": backend})
            undo.append(("chardev-remove", part.chardev))
            if part.netdev is not None:
                await execute("netdev_add", part.netdev)
                undo.append(("netdev_del", part.netdev["id"]))
            await execute("device_add", plugged(part, device.port))
        except BaseException:
            for command, name in reversed(undo):
                with contextlib.suppress(UserError):
                    await execute(command, {"id": name})
            raise

    async def _unplug(self, device: Plugged[Part]) -> None:
        await self._monitor.execute("device_del", {"id": device.id})

    async def _forget(self, device: Plugged[Part]) -> None:
        if device.part.netdev is not None:
            # Takes its socket along.
            await self._monitor.execute("netdev_del", {"id": device.part.netdev["id"]})
        else:
            await self._monitor.execute("chardev-remove", {"id": device.part.chardev})

    def _on_event(self, name: str, data: Any) -> None:
        match name:
            case "STOP" if self._state is State.RUNNING:
                self._state = State.PAUSED
            case "RESUME" if self._state is not State.ENDED:
                self._state = State.RUNNING
            case "SHUTDOWN":
                self._last_words = _ENDS.get(data.get("reason", ""), self._last_words)
            case "GUEST_PANICKED":
                self._last_words = _ENDS["guest-panic"]
            case "DEVICE_DELETED":
                self._let_go(data.get("device", ""))
            case "DEVICE_UNPLUG_GUEST_ERROR":
                refusal = UserError("the guest refuses to let go of the device")
                self._let_go(data.get("device", ""), refusal)

    async def _read_console(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 16):
                self.console.feed(data)

    def _error_text(self, line: str) -> str:
        return line.removeprefix(f"{PROGRAM}: ")

    async def _told(self) -> None:
        await self._monitor.ended()

    def _ended_by_itself(self, code: int) -> Outcome:
        return self._killed(code)
