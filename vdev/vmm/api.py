"""A virtual machine as its users see it, whatever runs it.

    async with Machine(config) as machine:     # everything is opened and built
        await machine.start()
        outcome = await machine.wait()

A machine is used once: when it has ended, it stays ended.
"""

from __future__ import annotations

import asyncio
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vdev.errors import UserError
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig
from vdev.vmm.console import Console

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from vdev.vmm.io_limit import IoLimit
    from vdev.vmm.sandbox import SandboxReport


Opened = Mapping[str, int]
"""Descriptors by name, for a machine that may open nothing itself; they stay the caller's."""


class NotSupported(UserError):
    """This VMM cannot do that."""


class State(enum.Enum):
    """What a machine is doing."""

    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class End(enum.Enum):
    """How a machine can end; the values are the exit codes of ``vdev run``."""

    SHUTDOWN = 0
    """The guest switched itself off."""
    STOPPED = 0x100
    """We were asked to end it (`stop`, a signal, the escape): exit code 0 too."""
    RESET_REFUSED = 10
    """The guest wanted a reset, and the configuration says reboot = false."""
    PANIC = 11
    """The guest's kernel said that it panicked (pvpanic)."""
    CRASHED = 12
    """A triple fault, or an exit that a CPU cannot go on from."""
    KILLED = 13
    """The VMM was killed or failed."""


Dial = Callable[[str], "socket.socket"]


class Outcome(NamedTuple):
    """How it ended; `detail` is one line for people, or empty."""

    end: End
    detail: str = ""

    @property
    def exit_code(self) -> int:
        """Of ``vdev run``."""
        return self.end.value & 0xFF

    def __str__(self) -> str:
        words = self.end.name.lower().replace("_", "-")
        return f"{words}: {self.detail}" if self.detail else words


class VirtualMachine(ABC):
    """An async context manager around one machine; `console` is its console.

    vmm: the name of what runs it.  sandbox, cgroup, io_limit, dial: set by whoever confined this
    process before `start`; `io_limit` is for disks that come later, `dial` connects anew to the
    back-end that listens on a path (None: a plain connect does).  Every method may be called at any
    time between enter and exit; one that makes no sense in the present state raises UserError.
    What ends the machine ends `wait`, which any number of tasks may await.
    """

    vmm: str

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self.console = Console(self._console_input, self._console_resize)
        self._state = State.BUILT
        self._ended: asyncio.Event = asyncio.Event()
        self._outcome: Outcome | None = None
        self.sandbox: SandboxReport | None = None
        self.cgroup: Path | None = None
        self.io_limit: IoLimit | None = None
        self.dial: Dial | None = None

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Opens and builds everything. Raises UserError and leaves nothing behind."""

    @abstractmethod
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the machine if it has not ended, and takes everything down."""

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._state

    @abstractmethod
    async def start(self) -> None:
        """Lets the CPUs run."""

    @abstractmethod
    async def pause(self) -> None:
        """Stops the CPUs; no disk request is under way any more. Pausing twice is pausing once."""

    @abstractmethod
    async def resume(self) -> None:
        """Lets the CPUs go on."""

    @abstractmethod
    async def power_button(self) -> None:
        """Presses it; what the guest does then is the guest's business."""

    @abstractmethod
    async def reset(self) -> None:
        """Starts the machine anew, as its reset button would."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends the machine now, without asking the guest; the outcome is STOPPED."""

    async def wait(self) -> Outcome:
        """Returns how the machine ended, once it has."""
        await self._ended.wait()
        assert self._outcome is not None
        return self._outcome

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What it is: name, vmm, state, cpus, memory (bytes), outcome (text or None), and devices:
        a list of dicts with id, kind, and what the device says of itself."""

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """devices: {id: counters, see `vdev.metrics.device_stats`}; iothreads: a list."""

    async def add_disk(self, disk: DiskConfig, opened: Opened | None = None) -> str:
        """Plugs a disk in and returns its id; the guest notices by itself. Raises UserError.

        opened: `image`, see `vdev.blk.open_image`.
        """
        raise self._cannot("plug a disk in while it runs")

    async def add_nic(self, nic: NicConfig, opened: Opened | None = None) -> str:
        """Plugs a network card in and returns its id. Raises UserError.

        opened: `socket`, connected to the back-end; or what `vdev.net.wiring.Wiring.opened` gives.
        """
        raise self._cannot("plug a network card in while it runs")

    async def remove(self, device: str) -> None:
        """Unplugs a disk or a card by its id; returns when the guest has let go of it."""
        raise self._cannot("unplug a device while it runs")

    async def set_link(self, device: str, up: bool) -> None:
        """Plugs or pulls the cable of a card by its id; the guest is told. Raises UserError."""
        raise self._cannot("plug or pull a cable")

    async def set_balloon(self, size: int) -> None:
        """Wants `size` bytes back from the guest; 0 = it may have everything."""
        raise self._cannot("change the balloon")

    async def snapshot(
        self,
        directory: str,
        *,
        files: Opened | None = None,
        base: str | None = None,
        track: bool = False,
    ) -> None:
        """Writes the whole paused or running machine into a new directory.

        files: those in it, opened by somebody else, who lets the directory appear afterwards: see
        `vdev.vmm.snapshot_files.file_names`.  track: the machine goes on noting what is written,
        so that the next snapshot can start from this one, its `base`.  Raises UserError.
        """
        raise self._cannot("write a snapshot")

    def _cannot(self, what: str) -> NotSupported:
        return NotSupported(f"machine {self.config.name}: the VMM {self.vmm} cannot {what}")

    def _must_run(self) -> None:
        """Raises UserError unless it was started and has not ended."""
        if self._state not in (State.RUNNING, State.PAUSED):
            raise UserError(f"machine {self.config.name}: it is {self._state.value}")

    def _must_open(self, what: str) -> None:
        """Raises UserError where this process has given up opening files, which `what` needs."""
        if self.sandbox is not None:
            raise UserError(
                f"machine {self.config.name}: its sandbox lets it open nothing: {what} takes what "
                "is open already, as vdev vm passes it"
            )

    def _confinement(self) -> dict[str, Any]:
        """What `info` says of it."""
        return {
            "sandbox": self.sandbox.as_dict() if self.sandbox is not None else None,
            "cgroup": str(self.cgroup) if self.cgroup is not None else None,
        }

    def _end(self, outcome: Outcome) -> None:
        """The first outcome counts."""
        if self._outcome is None:
            self._outcome = outcome
            self._state = State.ENDED
            self.console.close()
            self._ended.set()

    @abstractmethod
    async def _console_input(self, data: bytes) -> None:
        """Bytes typed into the console; returns when they are on their way."""

    def _console_resize(self, columns: int, rows: int) -> None:  # noqa: B027  (a serial line has no size)
        """The terminal's size; for a virtio console."""
