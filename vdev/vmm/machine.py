"""A machine on KVM: what can be done with it, and the devices that it is made of.

Its hardware is `board.py`, which has the map of the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vdev.blk.device import BlkDevice
from vdev.errors import NotSupported, UserError
from vdev.iothread import IOThread, settle
from vdev.runtime import runtime_dir
from vdev.virtio.device import Device
from vdev.vmm.acpi.registers import Event
from vdev.vmm.api import End, Opened, Outcome, State, VirtualMachine
from vdev.vmm.board import Board, Callbacks
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig, free_id
from vdev.vmm.parts import Maker, check_engines, undone_on_error
from vdev.vmm.ram import Ram
from vdev.vmm.vm import Exit

if TYPE_CHECKING:
    from vdev.vmm.devices.balloon import BalloonDevice
    from vdev.vmm.devices.console import ConsoleDevice
    from vdev.vmm.plugs import Plugged
    from vdev.vmm.snapshot import Snapshot
    from vdev.vmm.snapshot_writer import Writer

_log = logging.getLogger("vdev.machine")

D = TypeVar("D", bound=Device)
T = TypeVar("T")


class Machine(VirtualMachine):
    """A `VirtualMachine` on /dev/kvm of this host."""

    vmm = "kvm"

    def __init__(self, config: MachineConfig, snapshot: Snapshot | None = None) -> None:
        """snapshot: where it goes on from; `config` is that of `snapshot.config_of` then."""
        super().__init__(config)
        self._snapshot = snapshot
        self._stack = contextlib.AsyncExitStack()
        self._iothreads: list[IOThread] = []
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._board = Board(
            config,
            Callbacks(
                output=self.console.feed,
                shutdown=lambda: self._end(Outcome(End.SHUTDOWN)),
                reset=self._guest_reset,
                panic=lambda: self._end(Outcome(End.PANIC, "the guest's kernel panicked")),
                ejected=self._ejected,
                vcpu_ended=self._vcpu_ended,
            ),
        )
        self._tracked: str | None = None
        self._balloon: BalloonDevice | None = None
        self._virtio_console: ConsoleDevice | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._build()
        except BaseException:
            await settle(asyncio.ensure_future(self._stack.aclose()))
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(Outcome(End.STOPPED))
        await settle(asyncio.ensure_future(self._stack.aclose()))

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._changing:
            if self._state is not State.BUILT:
                raise UserError(f"machine {self.config.name}: it is {self._state.value}")
            for thread in self._iothreads:
                thread.start()
            check_engines(self.config.disks, self._iothreads)
            if self._snapshot is None:
                self._board.power_on()
            else:
                self._board.power_on_restored()
            await self._board.go_on()
            self._state = State.RUNNING
            if self._snapshot is not None:
                self._renew_cards(self._snapshot.config)

    async def pause(self) -> None:
        async with self._changing:
            self._must_run()
            if self._state is State.RUNNING:
                await self._board.stand_still()
                self._state = State.PAUSED

    async def resume(self) -> None:
        async with self._changing:
            self._must_run()
            if self._state is State.PAUSED:
                await self._board.go_on()
                self._state = State.RUNNING

    async def power_button(self) -> None:
        self._must_run()
        self._board.power.raise_event(Event.POWER_BUTTON)

    async def reset(self) -> None:
        async with self._changing:
            self._must_run()
            await self._board.reset()
            await self._board.go_on()
            self._state = State.RUNNING

    async def stop(self) -> None:
        self._end(Outcome(End.STOPPED))

    # -- what it consists of ------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "vmm": self.vmm,
            "state": self._state.value,
            "cpus": self.config.cpus,
            "memory": self.config.memory,
            "resident": self._board.ram.resident(),
            "outcome": str(self._outcome) if self._outcome else None,
            **self._confinement(),
            "devices": [
                {
                    "id": plugged.id,
                    "kind": plugged.kind,
                    "slot": plugged.slot,
                    **plugged.function.transport.info(),
                    **plugged.device.describe(),
                }
                for plugged in self._board.plugs
            ],
        }

    def counters(self) -> dict[str, Any]:
        vcpus = self._board.vm.vcpus if self._board.vm else []
        return {
            "vcpus": [vcpu.stats() for vcpu in vcpus],
            "serial": self._board.serial.stats(),
            "devices": {plugged.id: plugged.device.stats() for plugged in self._board.plugs},
            "iothreads": [thread.stats() for thread in self._iothreads if thread.native],
        }

    async def add_disk(self, disk: DiskConfig, opened: Opened | None = None) -> str:
        if not opened and not disk.path.startswith("null:"):
            self._must_open("add-disk")
        stack = contextlib.AsyncExitStack()
        async with self._plugging(disk, "disk", stack) as id:
            disk = dataclasses.replace(disk, id=id)
            device = self._maker.disk(disk, stack, opened)
            if self.io_limit is not None and not device.image.is_null:
                self.io_limit.apply(disk.path, device.image.fd)
            plugged = await self._insert(id, "blk", device, stack, disk)
        self._board.power.raise_event(Event.SLOTS_INSERTED, plugged.slot)
        return id

    async def add_nic(self, nic: NicConfig, opened: Opened | None = None) -> str:
        if not opened:
            self._must_open("add-nic")
        stack = contextlib.AsyncExitStack()
        async with self._plugging(nic, "nic", stack) as id:
            nic = dataclasses.replace(nic, id=id)
            nic = dataclasses.replace(nic, mac=self.config.mac_of(nic))
            device = await self._maker.nic(nic, stack, opened)
            plugged = await self._insert(id, "net", device, stack, nic)
        self._board.power.raise_event(Event.SLOTS_INSERTED, plugged.slot)
        return id

    async def _insert(
        self, id: str, kind: str, device: Device, stack: contextlib.AsyncExitStack, config: object
    ) -> Plugged:
        if not device.supports_log:
            # What it writes will not be known: the next snapshot starts anew.
            self._tracked = None
            await self._board.tracker.stop()
        return self._board.plugs.plug(id, kind, device, stack, config=config)

    async def remove(self, device: str) -> None:
        self._must_run()
        plugged = self._board.plugs.find(device)
        if self._board.plugs.pci is None:
            raise self._cannot("unplug a device from MMIO")
        plugged.renewed = False
        self._board.power.raise_event(Event.SLOTS_REQUESTED, plugged.slot)
        await plugged.gone.wait()

    async def snapshot(
        self,
        directory: str,
        *,
        files: Opened | None = None,
        base: str | None = None,
        track: bool = False,
    ) -> None:
        """See `VirtualMachine.snapshot`.

        RAM is copied while the guest runs; what it and its devices write meanwhile is copied once
        more when it stands still, if all devices can tell.  With a base only what was written
        since is read from the guest.  Each snapshot is whole by itself.
        """
        from vdev.vmm.snapshot_writer import Folder, Given, Writer, is_saved

        plugs = self._board.plugs
        if files is None:
            self._must_open("snapshot")
        async with self._changing:
            self._must_run()
            if shares := [plugged.id for plugged in plugs if plugged.kind == "fs"]:
                raise UserError(f"snapshot: what {shares[0]} has open lies with its server")
            if base is not None and self._tracked != base:
                raise UserError(
                    f"{base}: not the last snapshot of machine {self.config.name} that was taken "
                    "with tracking"
                )
            disks = {
                plugged.id: plugged.device.image.fd
                for plugged in plugs
                if isinstance(plugged.device, BlkDevice) and is_saved(plugged.device.image)
            }
            tracked = None
            try:
                with (
                    Folder(directory)
                    if files is None
                    else Given(files, disks, has_base=base is not None)
                ) as sink:
                    await self._write_snapshot(Writer(sink, self._board.ram), base, disks)
                tracked = directory if track else None
            finally:
                self._tracked = tracked
                if tracked is None:
                    await self._board.tracker.stop()

    async def _write_snapshot(
        self, writer: Writer, base: str | None, disks: Mapping[str, int]
    ) -> None:
        from vdev.vmm.snapshot_files import MEMORY

        board = self._board
        if base is None:
            await board.tracker.stop()
            with contextlib.suppress(NotSupported):
                await board.tracker.start(board.running)
        runs = self._state is State.RUNNING
        if base is not None:
            await _blocking(writer.copy_base, Path(base, MEMORY))
        elif board.tracker.is_on and runs:
            await _blocking(writer.copy_ram)
        if runs:
            await board.stand_still()
        try:
            if base is not None or (board.tracker.is_on and runs):
                await _blocking(writer.copy_pages, list(board.tracker.take()))
            else:
                await _blocking(writer.copy_ram)
            config = dataclasses.replace(
                self.config,
                disks=board.plugs.configs(DiskConfig),
                nics=board.plugs.configs(NicConfig),
            )
            await _blocking(writer.finish, config, board.save(), disks)
        finally:
            if runs:
                await board.go_on()

    async def set_balloon(self, size: int) -> None:
        self._must_run()
        if self._balloon is None:
            raise UserError(f"machine {self.config.name}: it was started without a balloon")
        self._balloon.set_target(size)

    async def set_link(self, device: str, up: bool) -> None:
        self._must_run()
        try:
            self._board.plugs.find(device).device.set_link(up)
        except OSError as error:
            raise UserError(f"device {device!r}: its tap: {error.strerror}") from None

    # -- building -----------------------------------------------------------------------------

    async def _build(self) -> None:
        """Everything that can fail by its user's mistake fails here, the cheapest first.

        No thread is started: the process may be confined before `start` does that.
        """
        config, board = self.config, self._board
        self._stack.callback(board.close)
        board.open(self._open_ram)
        self._iothreads = [IOThread(poll_us=config.poll_us) for _ in range(config.iothreads)]
        for thread in self._iothreads:
            self._stack.push_async_callback(thread.close)
        self._stack.push_async_callback(board.plugs.clear)
        self._maker = Maker(self._iothreads, board.ram, lambda: self.sandbox is not None, self.dial)
        # Last on, first off: with the vCPUs gone nobody asks any more.
        self._stack.push_async_callback(self._end_tasks)
        self._stack.push_async_callback(board.power_off)
        if self._snapshot is None:
            await self._plug_configured({})
        else:
            await self._restore(self._snapshot)

    async def _restore(self, snapshot: Snapshot) -> None:
        """Nothing of what is there is touched before all is known to fit."""
        from vdev.vmm.snapshot_disks import DiskCopies

        with DiskCopies(snapshot, self.config) as disks:
            await self._plug_configured(disks.opened)
            with _fitting(snapshot):
                self._board.restore(snapshot.state)
            disks.put()

    def _open_ram(self) -> Ram:
        config, snapshot = self.config, self._snapshot
        if snapshot is None:
            return Ram(config.memory, hugepages=config.hugepages)
        remote = bool(config.vhost_user) or any(nic.socket for nic in config.nics)
        image = os.open(snapshot.memory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return Ram(
                config.memory, hugepages=config.hugepages and remote, image=image, shared=remote
            )
        finally:
            os.close(image)

    async def _plug_configured(self, images: Opened) -> None:
        """images: those that are open already, by the disks' ids."""
        config, maker = self.config, self._maker
        for disk in config.disks:
            opened = {"image": images[disk.id]} if disk.id in images else None
            await self._plug(disk.id, "blk", partial(maker.disk, disk, opened=opened), disk)
        for nic in config.nics:
            await self._plug(nic.id, "net", partial(maker.nic, nic), nic)
        for other in config.vhost_user:
            await self._plug(other.id, other.kind, partial(maker.vhost_user, other))
        for share in config.shares:
            await self._plug(share.id, "fs", partial(maker.share, share))
        if config.vsock is not None:
            path = str(runtime_dir() / f"{config.name}.vsock")
            await self._plug("vsock", "vsock", partial(maker.vsock, path, config.vsock))
        if config.rng:
            await self._plug("rng", "rng", maker.rng)
        if config.balloon:
            self._balloon = await self._plug("balloon", "balloon", maker.balloon)
        if config.console == "virtio":
            self._virtio_console = await self._plug(
                "console", "console", partial(maker.console, self.console.feed)
            )

    async def _plug(
        self, id: str, kind: str, make: Callable[..., D | Awaitable[D]], config: object = None
    ) -> D:
        """Makes a device, by `make(stack)`, and plugs it in, where a snapshot had it."""
        slot = None
        if self._snapshot is not None:
            with _fitting(self._snapshot):
                slot = self._board.plugs.slot_of(self._snapshot.state["devices"], id)
        stack = contextlib.AsyncExitStack()
        async with undone_on_error(stack):
            made = make(stack)
            device = await made if isinstance(made, Awaitable) else made
            self._board.plugs.plug(id, kind, device, stack, config=config, slot=slot)
        return device

    @contextlib.asynccontextmanager
    async def _plugging(
        self, device: DiskConfig | NicConfig, stem: str, stack: contextlib.AsyncExitStack
    ) -> AsyncIterator[str]:
        """The id for a device that is plugged in while the machine runs."""
        async with self._changing:
            self._must_run()
            if self._board.plugs.pci is None:
                raise self._cannot("plug a device into MMIO while it runs")
            used = {plugged.id for plugged in self._board.plugs}
            if device.id in used:
                raise UserError(f"id {device.id!r}: a device of this machine has it")
            async with undone_on_error(stack):
                yield device.id or free_id(stem, used)

    async def _ejected(self, slot: int) -> None:
        """The guest has let go of a slot, asked or unasked."""
        plugged = self._board.plugs.at(slot)
        if plugged is None:
            return
        if plugged.renewed:
            again = await self._board.plugs.renew(plugged)
            self._board.power.raise_event(Event.SLOTS_INSERTED, again.slot)
        else:
            await self._board.plugs.unplug(plugged)

    # -- what happens by itself ---------------------------------------------------------------

    def _renew_cards(self, before: MachineConfig) -> None:
        """A driver reads a card's address once: those that have another are plugged in anew."""
        known = {nic.id: nic.mac for nic in before.nics}
        for plugged in self._board.plugs:
            nic = plugged.config
            if isinstance(nic, NicConfig) and nic.mac != known.get(nic.id):
                plugged.renewed = True
                self._board.power.raise_event(Event.SLOTS_REQUESTED, plugged.slot)

    def _guest_reset(self) -> None:
        if not self.config.reboot:
            self._end(Outcome(End.RESET_REFUSED, "the guest wanted a reset"))
            return
        # Not from within the access that asks for it: that one ends with its vCPU.
        self._spawn(self._reset_for_guest())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("machine %s: %s", self.config.name, error)

    async def _reset_for_guest(self) -> None:
        try:
            await self.reset()
        except (UserError, OSError) as error:
            self._end(Outcome(End.CRASHED, f"it could not be reset: {error}"))

    def _vcpu_ended(self, exit: Exit) -> None:
        if exit.is_triple_fault:
            self._end(Outcome(End.CRASHED, f"triple fault on vCPU {exit.vcpu}"))
        else:
            detail = f"vCPU {exit.vcpu}: {exit.reason}, code {exit.code:#x}"
            self._end(Outcome(End.CRASHED, detail))

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- console ------------------------------------------------------------------------------

    async def _console_input(self, data: bytes) -> None:
        if self._virtio_console is not None:
            await self._virtio_console.send(data)
        else:
            await self._board.serial.write(data)

    def _console_resize(self, columns: int, rows: int) -> None:
        if self._virtio_console is not None:
            self._virtio_console.resize(columns, rows)


async def _blocking(work: Callable[..., T], *args: Any) -> T:
    """Its result, from another thread; it goes on to its end whatever happens to who waits."""
    return await settle(asyncio.ensure_future(asyncio.to_thread(work, *args)))


@contextlib.contextmanager
def _fitting(snapshot: Snapshot) -> Iterator[None]:
    """A state that does not fit the machine, or this KVM, is the snapshot's fault."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{snapshot.directory}: it does not fit: {error}") from None
