"""A KVM virtual machine: its vCPU threads, and what they tell the event loop.

A `VM` lives from power-on to reset: a reset makes a new one over the same devices and memory, so
no state of the processor or of an interrupt controller survives that should not.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vdev._native import ffi, lib
from vdev.errors import UserError
from vdev.iothread import new_token, read_events
from vdev.memory import GuestMemory
from vdev.registers import Bus, check
from vdev.vmm.boot import EntryState

KVM = "/dev/kvm"

_SEGMENT_FIELDS = tuple(name for name, _ in ffi.typeof("struct vmm_segment").fields)
_EXITS: dict[int, str] = {
    value: name.removeprefix("VMM_EXIT_").lower().replace("_", " ")
    for value, name in ffi.typeof("enum vmm_exit").elements.items()
}


class Exit(NamedTuple):
    """A vCPU that cannot go on. reason: in words, such as "triple fault"."""

    vcpu: int
    reason: str
    code: int

    @property
    def is_triple_fault(self) -> bool:
        return self.reason == _EXITS[lib.VMM_EXIT_TRIPLE_FAULT]


class Route(NamedTuple):
    """The message behind a GSI."""

    gsi: int
    address: int
    data: int


def open_kvm() -> int:
    """A descriptor of /dev/kvm. Raises UserError where KVM cannot be had, or lacks something."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{KVM}: {error.strerror}") from None
    missing = ffi.new("const char **")
    if lib.vmm_kvm_check(fd, missing) < 0:
        os.close(fd)
        raise UserError(f"{KVM} lacks {ffi.string(missing[0]).decode()}")
    return fd


class Vcpu:
    """A vCPU thread."""

    def __init__(self, native: Any, index: int, token: int) -> None:
        self.native = native
        self.index = index
        self.token = token
        self.paused: asyncio.Future[None] | None = None

    def enter(self, entry: EntryState) -> None:
        """Where and how it begins."""
        native = ffi.new("struct vmm_entry *")
        for name in ("rip", "rsi", "rbx", "cr0", "cr3", "cr4", "efer", "gdt_base", "gdt_limit"):
            setattr(native, name, getattr(entry, name))
        native.code, native.data, native.task = (
            {name: getattr(segment, name) for name in _SEGMENT_FIELDS}
            for segment in (entry.code, entry.data, entry.tss)
        )
        check(lib.vmm_vcpu_set_entry(self.native, native), f"registers of vCPU {self.index}")

    def stats(self) -> dict[str, int]:
        """Exits by kind, and CPU time in nanoseconds."""
        out = ffi.new("struct vmm_vcpu_stats *")
        lib.vmm_vcpu_read_stats(self.native, out)
        names = ("exits", "mmio", "pio", "told", "lost", "run_ns")
        return {name: int(getattr(out, name)) for name in names}

    def save(self) -> bytes:
        """Its state while it stands still (opaque)."""
        return _saved(lib.vmm_vcpu_save, self.native, f"state of vCPU {self.index}")

    def load(self, state: bytes) -> None:
        """Raises OSError where KVM refuses it."""
        check(lib.vmm_vcpu_load(self.native, state, len(state)), f"state of vCPU {self.index}")


class VM:
    """A virtual machine within a running event loop; close it with `close`.

    memory: the guest's.  on_exit: called with each vCPU's `Exit`.
    """

    def __init__(
        self, kvm_fd: int, bus: Bus, memory: GuestMemory, on_exit: Callable[[Exit], None]
    ) -> None:
        """Raises OSError where KVM refuses."""
        self._bus = bus
        self._on_exit = on_exit
        self._answers: set[asyncio.Task[None]] = set()
        self.vcpus: list[Vcpu] = []
        self._by_token: dict[int, Vcpu] = {}
        events = ffi.new("struct vhost_events **")
        check(lib.vhost_events_new(events), "events of a machine")
        self._events = ffi.gc(events[0], lib.vhost_events_free)
        out = ffi.new("struct vmm_vm **")
        result = lib.vmm_vm_new(kvm_fd, bus.native, self._events, memory.native, out)
        check(result, "virtual machine")
        self.native = out[0]
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(lib.vhost_events_fd(self._events), self._read_events)

    def log_dirty(self, on: bool) -> None:
        """Has KVM note the pages that vCPUs write, or no more."""
        check(lib.vmm_vm_log_dirty(self.native, on), "the log of written pages")

    def take_dirty(self, region: int, pages: int) -> bytearray:
        """Takes out what was noted of a region of so many pages: bit n % 8 of byte n / 8."""
        bits = bytearray(-(-pages // 64) * 8)
        result = lib.vmm_vm_take_dirty(self.native, region, ffi.from_buffer(bits))
        check(result, "the log of written pages")
        return bits

    def add_vcpu(self, apic_id: int, cpuid: Any, count: int) -> Vcpu:
        """A vCPU with `count` entries of struct vmm_cpuid; the first is the boot processor."""
        out, token = ffi.new("struct vmm_vcpu **"), new_token()
        result = lib.vmm_vcpu_new(self.native, apic_id, token, cpuid, count, out)
        check(result, f"vCPU {len(self.vcpus)}")
        vcpu = Vcpu(out[0], len(self.vcpus), token)
        self.vcpus.append(vcpu)
        self._by_token[token] = vcpu
        return vcpu

    def set_routes(self, routes: Sequence[Route]) -> None:
        table = ffi.new("struct vmm_route[]", max(1, len(routes)))
        for at, route in enumerate(routes):
            table[at] = {"gsi": route.gsi, "address": route.address, "data": route.data}
        check(lib.vmm_vm_set_routes(self.native, table, len(routes)), "interrupt routes")

    def irqfd(self, fd: int, gsi: int, assign: bool) -> None:
        """Has a write to eventfd `fd` raise `gsi`, or no more."""
        check(lib.vmm_vm_irqfd(self.native, fd, gsi, assign), f"interrupt {gsi}")

    def ioeventfd(
        self, fd: int, space: int, address: int, assign: bool, *, match: int | None = None
    ) -> None:
        """Has guest writes to `address` signal eventfd `fd`: of any size, or 32 bits of `match`."""
        size = 0 if match is None else 4
        result = lib.vmm_vm_ioeventfd(
            self.native, fd, space, address, size, match is not None, match or 0, assign
        )
        check(result, f"notification at {address:#x}")

    def start(self, cpus: Sequence[int] = ()) -> None:
        """Starts the threads, which stand still until `resume`; cpus: one to pin each to."""
        for vcpu in self.vcpus:
            cpu = cpus[vcpu.index] if cpus else -1
            check(lib.vmm_vcpu_start(vcpu.native, cpu), f"thread of vCPU {vcpu.index}")

    def resume(self) -> None:
        for vcpu in self.vcpus:
            lib.vmm_vcpu_resume(vcpu.native)

    async def pause(self) -> None:
        """Returns when all vCPUs stand still, their accesses finished."""
        futures = []
        for vcpu in self.vcpus:
            vcpu.paused = self._loop.create_future()
            futures.append(vcpu.paused)
            lib.vmm_vcpu_pause(vcpu.native)
        await asyncio.gather(*futures)

    def save(self) -> bytes:
        """State of interrupt controllers and clock while all stand still (opaque)."""
        return _saved(lib.vmm_vm_save, self.native, "state of the machine")

    def load(self, state: bytes) -> None:
        """Raises OSError where KVM refuses it."""
        check(lib.vmm_vm_load(self.native, state, len(state)), "state of the machine")

    async def close(self) -> None:
        """Ends the threads, whatever they do, and frees the machine."""
        if self.native is None:
            return
        self._loop.remove_reader(lib.vhost_events_fd(self._events))
        for task in self._answers:
            task.cancel()
        # An answer under way may be starting queues: it ends before what it works on does.
        await asyncio.gather(*self._answers, return_exceptions=True)
        for vcpu in self.vcpus:
            lib.vmm_vcpu_free(vcpu.native)
        self.vcpus.clear()
        lib.vmm_vm_free(self.native)
        self.native = None
        ffi.release(self._events)

    def _read_events(self) -> None:
        for event in read_events(self._events):
            vcpu = self._by_token[event.token]
            if event.kind == lib.VMM_EVENT_ACCESS:
                self._access(vcpu)
            elif event.kind == lib.VMM_EVENT_EXIT:
                reason = _EXITS.get(event.value, f"exit {event.value}")
                self._on_exit(Exit(vcpu.index, reason, event.result))
            elif vcpu.paused is not None and not vcpu.paused.done():
                vcpu.paused.set_result(None)

    def _access(self, vcpu: Vcpu) -> None:
        task = asyncio.ensure_future(self._answer(vcpu))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, vcpu: Vcpu) -> None:
        told = ffi.new("struct vmm_access *")
        check(lib.vmm_vcpu_access(vcpu.native, told), "told access")
        value = 0
        try:
            value = await self._bus.answer(told)
        finally:
            lib.vmm_vcpu_answer(vcpu.native, value)


def _saved(save: Callable[..., int], native: Any, what: str) -> bytes:
    size = save(native, ffi.NULL, 0)
    check(size, what)
    # Between the two calls an MSR more could be there: some room.
    data = ffi.new("uint8_t[]", size + 1024)
    size = save(native, data, size + 1024)
    check(size, what)
    return bytes(ffi.buffer(data, size))
