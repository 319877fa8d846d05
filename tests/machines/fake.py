"""A machine without a guest: it writes down what it was asked for."""

from __future__ import annotations

from typing import Any, Self

from vdev.vmm.api import End, Opened, Outcome, State, VirtualMachine
from vdev.vmm.config import DiskConfig, MachineConfig


class FakeMachine(VirtualMachine):
    vmm = "fake"

    def __init__(self, name: str = "fake") -> None:
        super().__init__(MachineConfig(name=name, kernel="k"))
        self.asked: list[Any] = []
        self.size: tuple[int, int] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._state = State.RUNNING

    async def pause(self) -> None:
        self._must_run()
        self.asked.append("pause")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def power_button(self) -> None:
        self.asked.append("power button")
        self._end(Outcome(End.SHUTDOWN))

    async def reset(self) -> None:
        self.asked.append("reset")

    async def stop(self) -> None:
        self._end(Outcome(End.STOPPED))

    def info(self) -> dict[str, Any]:
        disk = {"id": "disk0", "kind": "blk", "socket": "", "state": "external"}
        return {"name": self.config.name, "state": self.state.value, "devices": [disk]}

    def counters(self) -> dict[str, Any]:
        return {"iothreads": [], "devices": {}}

    async def add_disk(self, disk: DiskConfig, opened: Opened | None = None) -> str:
        self.asked.append(disk)
        return disk.id or "disk1"

    async def set_balloon(self, size: int) -> None:
        self.asked.append(size)

    async def _console_input(self, data: bytes) -> None:
        self.console.feed(data.upper())

    def _console_resize(self, columns: int, rows: int) -> None:
        self.size = (columns, rows)
