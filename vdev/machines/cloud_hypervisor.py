"""A machine on cloud-hypervisor; this process serves its disks and network cards by vhost-user.

The machine is made and driven by the API: ``vm.create`` when it is built, ``vm.boot`` when it
starts.  API and events come on sockets that the program inherits, the console on a terminal.
A reset makes cloud-hypervisor connect to every device anew, by its path: that of a descriptor of
ours, since the socket's own path is gone before the program starts.
"""

from __future__ import annotations

import asyncio
import os
import re

from vdev.errors import UserError
from vdev.machines.cloud_hypervisor_api import Api, api_sockets, events
from vdev.machines.cloud_hypervisor_config import (
    PROGRAM,
    SLOTS,
    CloudHypervisorParts,
    Part,
    program_command,
    vm_config,
)
from vdev.machines.foreign import STOP_PATIENCE, ForeignMachine, cancel
from vdev.machines.plugged import DeviceSet, Plugged
from vdev.machines.terminal import Terminal
from vdev.vmm.api import End, Outcome, State
from vdev.vmm.config import MachineConfig

START_PATIENCE = 30.0
"""Seconds that the program has to answer for the first time."""

# "cloud-hypervisor: 1.2s: <vmm> ERROR:vmm/src/lib.rs:1 -- text"; "  0: text" in a chain of causes.
_LOG = re.compile(r"cloud-hypervisor: .*? -- (.*)")
_CAUSE = re.compile(r"(\d+): (.*)")
_CPU_FAULTS = ("VCPU generated error", "vCPU thread panicked")


class CloudHypervisorMachine(ForeignMachine[Part]):
    """A `VirtualMachine` on cloud-hypervisor, which needs KVM."""

    vmm = "cloud-hypervisor"
    title = "cloud-hypervisor"
    accelerator = "kvm"

    def __init__(self, config: MachineConfig) -> None:
        super().__init__(config)
        self._refuse(
            {"machine without rng": not config.rng}, (PROGRAM, "setpriv", "setsid"), len(SLOTS)
        )
        self._devices = DeviceSet(config, SLOTS, CloudHypervisorParts())
        self._resets = 0
        """Asked for by us, and not heard of yet."""

    async def _launch(self) -> None:
        stack = self._stack
        for device in self._devices:
            _reach(device)
        monitor, its_monitor = self._socketpair()
        client, listener = api_sockets()
        stack.callback(listener.close)
        self._api = await Api.on(client)
        stack.push_async_callback(self._api.close)
        reader, writer = await asyncio.open_unix_connection(sock=monitor)
        stack.callback(writer.close)
        self._terminal = Terminal(self.console.feed)
        stack.callback(self._terminal.close)
        await self._spawn(
            program_command(self.config, api_fd=listener.fileno(), events_fd=its_monitor.fileno()),
            [listener, its_monitor],
            stdin=self._terminal.stdin,
            stdout=self._terminal.stdout,
        )
        self._terminal.hand_over()
        self._events = asyncio.ensure_future(self._listen(reader))
        stack.push_async_callback(cancel, [self._events])
        try:
            await asyncio.wait_for(self._api.get("vmm.ping"), START_PATIENCE)
        except TimeoutError:
            raise UserError(
                f"{self.title} does not start: no answer within {START_PATIENCE:g} s"
            ) from None
        except UserError:
            raise await self._not_started() from None
        self._watch()
        devices = [(device.part, device.address) for device in self._devices]
        await self._api.put("vm.create", vm_config(self.config, devices))

    async def start(self) -> None:
        if self._state is not State.BUILT:
            raise UserError(f"machine {self.config.name}: it is {self._state.value}")
        await self._api.put("vm.boot")
        self._now(State.RUNNING)

    async def pause(self) -> None:
        self._must_run()
        if self._state is not State.PAUSED:
            await self._api.put("vm.pause")
            self._now(State.PAUSED)

    async def resume(self) -> None:
        self._must_run()
        if self._state is not State.RUNNING:
            await self._api.put("vm.resume")
            self._now(State.RUNNING)

    async def power_button(self) -> None:
        self._must_run()
        await self._api.put("vm.power-button")

    async def reset(self) -> None:
        self._must_run()
        self._resets += 1
        await self._api.put("vm.reboot")
        self._now(State.RUNNING)

    async def set_balloon(self, size: int) -> None:
        self._left_by(size)
        await self._api.put("vm.resize", {"desired_balloon": size})

    async def _quit(self) -> None:
        await self._api.put("vmm.shutdown")

    async def _console_input(self, data: bytes) -> None:
        await self._terminal.write(data)

    def _console_resize(self, columns: int, rows: int) -> None:
        self._terminal.resize(columns, rows)

    def _now(self, state: State) -> None:
        if self._state is not State.ENDED:
            self._state = state

    async def _plug(self, device: Plugged[Part]) -> None:
        _reach(device)
        command = "vm.add-disk" if device.kind == "blk" else "vm.add-net"
        await self._api.put(command, device.part.at(device.address))

    async def _unplug(self, device: Plugged[Part]) -> None:
        await self._api.put("vm.remove-device", {"id": device.id})

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        async for event in events(reader):
            properties = event.get("properties") or {}
            match event.get("source"), event.get("event"):
                case "guest", "panic" if properties.get("event") == "panic":
                    self._end_with(Outcome(End.PANIC, "the guest's kernel panicked"))
                case "vm", "rebooting" if self._resets:
                    self._resets -= 1
                case "vm", "rebooting" if not self.config.reboot:
                    words = "the guest wanted a reset (or had a triple fault)"
                    self._end_with(Outcome(End.RESET_REFUSED, words))
                case "vm", "device-removed":
                    self._let_go(str(properties.get("id")))

    def _end_with(self, outcome: Outcome) -> None:
        """The program would go on, and we do not let it."""
        if self._last_words is None:
            self._last_words = outcome
        if self._process.returncode is None:
            self._process.kill()

    def _error_text(self, line: str) -> str:
        if cause := _CAUSE.fullmatch(line):
            return cause[2] if cause[1] == "0" else f"{self._said}: {cause[2]}"
        if line.startswith("Error: "):
            return ""  # the causes come now
        text = log[1] if (log := _LOG.fullmatch(line)) else line
        if text.startswith(_CPU_FAULTS) and self._last_words is None:
            self._last_words = Outcome(End.CRASHED, text)
        return text

    async def _told(self) -> None:
        # The child that watches the terminal's size may hold on to it for a moment.
        gone = asyncio.ensure_future(self._terminal.gone())
        await asyncio.wait([self._events, gone], timeout=STOP_PATIENCE)
        await cancel([gone])

    def _ended_by_itself(self, code: int) -> Outcome:
        if code == 0 and self._state is not State.BUILT:
            return Outcome(End.SHUTDOWN)
        return self._killed(code)


def _reach(device: Plugged[Part]) -> None:
    """Lets the program connect by a descriptor of ours, as often as it likes, and nobody else."""
    if device.folder is not None:
        fd = os.open(device.address, os.O_PATH | os.O_CLOEXEC)
        device.stack.callback(os.close, fd)
        device.address = f"/proc/{os.getpid()}/fd/{fd}"
        device.hide()
