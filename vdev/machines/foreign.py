"""What machines in another program have in common: its process, our devices that it drives.

The program has a death signal that ends it with us, and what it needs of us are descriptors that
it inherits, or sockets in private folders that are gone as soon as it has connected.  So `kill -9`
of a running machine leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import socket
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.machines.plugged import DeviceSet, Plugged, describe
from vdev.ratelog import RateLimitedLog
from vdev.server.pool import running_iothreads
from vdev.units import format_size
from vdev.vmm.api import End, NotSupported, Opened, Outcome, State, VirtualMachine
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig

_log = logging.getLogger("vdev.machine")

STOP_PATIENCE = 10.0
"""Seconds that the program has to end by itself."""
UNPLUG_PATIENCE = 30.0
"""Seconds that a guest has to let go of a device."""

P = TypeVar("P")


class ForeignMachine(VirtualMachine, Generic[P]):
    """A `VirtualMachine` in another program, which messages call `title`."""

    title: str
    accelerator: str
    _devices: DeviceSet[P]

    def __init__(self, config: MachineConfig) -> None:
        super().__init__(config)
        self._stack = contextlib.AsyncExitStack()
        self._unplugging: dict[str, asyncio.Future[None]] = {}
        self._changing = asyncio.Lock()
        self._last_words: Outcome | None = None
        self._stopping = False
        self._said = ""

    @abstractmethod
    async def _launch(self) -> None:
        """Starts the program and has it build the machine. Raises UserError."""

    @abstractmethod
    async def _quit(self) -> None:
        """Asks the program to end."""

    @abstractmethod
    async def _told(self) -> None:
        """Returns when all was heard that the program told before its end."""

    @abstractmethod
    async def _plug(self, device: Plugged[P]) -> None:
        """Into the running machine. Raises UserError with nothing changed in the program."""

    @abstractmethod
    async def _unplug(self, device: Plugged[P]) -> None:
        """Asks the guest to let go of it; `_let_go` is called when it has, or refuses."""

    async def _forget(self, device: Plugged[P]) -> None:
        """The device is gone: so goes what the program had behind it."""

    @abstractmethod
    def _ended_by_itself(self, code: int) -> Outcome:
        """What it means that the program ended with this code, and nothing else was said."""

    def _refuse(self, wanted: Mapping[str, bool], programs: Sequence[str], most: int) -> None:
        """Raises NotSupported for what is wanted, and UserError without the programs."""
        config = self.config
        wanted = {
            "vsock": config.vsock is not None,
            "limits": config.limits.any,
            "shares": bool(config.shares),
            "sandbox user": config.sandbox.user is not None,
            "transport mmio": config.transport == "mmio",
            **wanted,
        }
        missing = [name for name, asked in wanted.items() if asked]
        if missing:
            raise NotSupported(
                f"machine {config.name}: the VMM {self.vmm} has no {', '.join(missing)}: leave it "
                "out, or run it on KVM"
            )
        count = len(tuple(config.devices()))
        if count > most:
            raise NotSupported(
                f"machine {config.name}: {count} devices, but the VMM {self.vmm} takes {most}"
            )
        for program in programs:
            if shutil.which(program) is None:
                raise UserError(f"vmm {self.vmm}: {program} was not found: see vdev doctor")

    async def __aenter__(self) -> Self:
        stack = self._stack
        try:
            config = self.config
            self._threads: Sequence[IOThread] = await stack.enter_async_context(
                running_iothreads(config.iothreads, poll_us=config.poll_us)
            )
            stack.push_async_callback(self._devices.close_all)
            await self._devices.open_all(self._threads)
            await self._launch()
        except BaseException:
            await stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        finally:
            await self._stack.aclose()

    async def stop(self) -> None:
        if self._state is State.ENDED:
            return
        self._stopping = True
        quitting = asyncio.ensure_future(self._quit())
        try:
            await asyncio.wait_for(self._ended.wait(), STOP_PATIENCE)
        except TimeoutError:
            await self._kill()
            await self._ended.wait()
        finally:
            await cancel([quitting])

    async def add_disk(self, disk: DiskConfig, opened: Opened | None = None) -> str:
        self._must_open_itself(opened)
        self._must_run()
        async with self._changing:
            disk = dataclasses.replace(disk, id=self._devices.new_id("disk", disk.id))
            return await self._plug_or_close(await self._devices.open_disk(disk))

    async def add_nic(self, nic: NicConfig, opened: Opened | None = None) -> str:
        self._must_open_itself(opened)
        self._must_run()
        async with self._changing:
            nic = dataclasses.replace(nic, id=self._devices.new_id("nic", nic.id))
            return await self._plug_or_close(await self._devices.open_nic(nic))

    async def remove(self, device: str) -> None:
        self._must_run()
        async with self._changing:
            found = self._devices.find(device)
            gone = self._unplugging[device] = asyncio.get_running_loop().create_future()
            try:
                await self._unplug(found)
                await asyncio.wait_for(gone, UNPLUG_PATIENCE)
            except TimeoutError:
                raise UserError(f"device {device}: the guest does not let go of it") from None
            finally:
                del self._unplugging[device]
            await self._forget(found)
            await self._devices.close(found)

    def info(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": config.name,
            "vmm": self.vmm,
            "accelerator": self.accelerator,
            "state": self._state.value,
            "outcome": str(self._outcome) if self._outcome is not None else None,
            "cpus": config.cpus,
            "memory": config.memory,
            "devices": [describe(device) for device in self._devices],
        }

    def counters(self) -> dict[str, Any]:
        return {
            "iothreads": [
                {"tid": t.tid, "io_uring": t.has_io_uring, **t.stats()} for t in self._threads
            ],
            "devices": {
                device.id: device.server.device.stats()
                for device in self._devices
                if device.server is not None
            },
        }

    def _must_open_itself(self, opened: Opened | None) -> None:
        if opened:
            raise self._cannot("take what others have opened: give it the path alone")

    def _left_by(self, balloon: int) -> int:
        """The bytes that a balloon of this size leaves. Raises UserError."""
        self._must_run()
        if not self.config.balloon:
            raise UserError(f"machine {self.config.name}: it has no balloon: balloon = true")
        left = self.config.memory - balloon
        if left <= 0:
            raise UserError(
                f"balloon of {format_size(balloon)}: the machine has "
                f"{format_size(self.config.memory)}"
            )
        return left

    async def _plug_or_close(self, device: Plugged[P]) -> str:
        try:
            await self._plug(device)
        except BaseException:
            await self._devices.close(device)
            raise
        device.hide()
        return device.id

    def _let_go(self, device: str, error: UserError | None = None) -> None:
        """The guest has let go of it, or (error) will not."""
        gone = self._unplugging.get(device)
        if gone is None or gone.done():
            return
        if error is None:
            gone.set_result(None)
        else:
            gone.set_exception(error)

    # The program's life

    def _socketpair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        self._stack.callback(theirs.close)
        return ours, theirs

    async def _spawn(
        self, command: Sequence[str], handed: Sequence[socket.socket], **options: Any
    ) -> None:
        """Starts the program; `handed` are closed here."""
        # One of them at least is our connection to the program, and its own copy must be the last:
        # its end is then the end of file.
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[sock.fileno() for sock in handed],
            **options,
        )
        self._stack.push_async_callback(self._kill)
        for sock in handed:
            sock.close()
        self._errors = asyncio.ensure_future(self._read_errors())
        self._stack.push_async_callback(cancel, [self._errors])

    async def _not_started(self) -> UserError:
        """Why it does not start: it hangs up a moment before it has said that."""
        await asyncio.wait([self._errors], timeout=STOP_PATIENCE)
        return UserError(f"{self.title} does not start: {self._said or 'it said nothing'}")

    def _watch(self) -> None:
        """It has started: its end is the machine's from now on."""
        watch = asyncio.ensure_future(self._watch_end())
        self._stack.push_async_callback(cancel, [watch])

    async def _read_errors(self) -> None:
        warnings = RateLimitedLog(_log)
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            text = self._error_text(line.decode(errors="replace").strip())
            if text and self._state is not State.BUILT:
                warnings.warning("%s: %s", self.title, text)
            self._said = text or self._said

    def _error_text(self, line: str) -> str:
        """What is worth saying of a line that the program wrote."""
        return line

    async def _watch_end(self) -> None:
        code = await self._process.wait()
        await asyncio.wait([self._errors], timeout=STOP_PATIENCE)
        # What it said before it ended may be on its way to us still.
        await self._told()
        if self._stopping:
            self._end(Outcome(End.STOPPED))
        elif self._last_words is not None:
            self._end(self._last_words)
        else:
            self._end(self._ended_by_itself(code))
        for device in tuple(self._unplugging):
            self._let_go(device, UserError("the machine has ended"))

    def _killed(self, code: int) -> Outcome:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome(End.KILLED, f"{self.title} ended with {how}: {self._said}")

    async def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels them and returns when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
