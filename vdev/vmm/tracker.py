"""Which pages of RAM were written since they were last taken: by vCPUs, which KVM notes, and by
devices, which note it themselves in one log."""

from __future__ import annotations

from collections.abc import Iterator

from vdev.dirtylog import LOG_PAGE, DirtyLog
from vdev.vmm.plugs import Plugs
from vdev.vmm.ram import Ram
from vdev.vmm.vm import VM

_EVERYTHING = b"\xff"


class Tracker:
    """What is written from `start` on, over whatever `VM` there is."""

    def __init__(self, ram: Ram, plugs: Plugs) -> None:
        self._ram = ram
        self._plugs = plugs
        self._vm: VM | None = None
        self._log: DirtyLog | None = None
        self._all = False

    @property
    def is_on(self) -> bool:
        return self._log is not None

    async def start(self, vm: VM) -> None:
        """Raises NotSupported where a device cannot log what it writes."""
        last = self._ram.ranges[-1]
        log = DirtyLog.new((last.base + last.size) // LOG_PAGE)
        await self._plugs.set_log(log)
        self._log = log
        self.attach(vm)

    async def stop(self) -> None:
        if self._log is not None:
            await self._plugs.set_log(None)
            self._log = None
        if self._vm is not None:
            self._vm.log_dirty(False)
            self._vm = None
        self._all = False

    def attach(self, vm: VM) -> None:
        """A VM begins; if it is not the first, RAM has been loaded anew."""
        if self._log is None:
            return
        self._all = self._all or self._vm is not None
        vm.log_dirty(True)
        self._vm = vm

    def take(self) -> Iterator[tuple[int, int]]:
        """Offsets in RAM's file, and ends, of what was written since; nothing runs meanwhile."""
        assert self._vm is not None
        assert self._log is not None
        everything, self._all = self._all, False
        for index, range_ in enumerate(self._ram.ranges):
            pages = range_.size // LOG_PAGE
            bits = self._vm.take_dirty(index, pages)
            self._log.take(range_.base // LOG_PAGE, bits)
            if everything:
                bits = bytearray(_EVERYTHING * (pages // 8))
            for start, end in runs(bits, pages):
                yield range_.offset + start * LOG_PAGE, range_.offset + end * LOG_PAGE


def runs(bits: bytes | bytearray, count: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of the runs of ones among the first `count` bits, the lowest first."""
    number = int.from_bytes(bits, "little") & (1 << count) - 1
    text = f"{number:0{count}b}"[::-1]
    start = text.find("1")
    while start >= 0:
        end = text.find("0", start)
        end = count if end < 0 else end
        yield start, end
        start = text.find("1", end)
