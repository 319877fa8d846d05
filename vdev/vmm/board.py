"""The board of a machine on KVM: what is there from power-on to power-off, and what stays.

```
Board ── ram.py          memory file            boot/       kernel → memory, first registers
   │ ├── vm.py           KVM, vCPU threads      acpi/       tables → memory
   │ ├── registers.py    bus of windows         power.py    sleep, reset, event block
   │ ├── interrupts.py   GSIs and eventfds      serial.py   8250 → console.py
   │ └── plugs.py  pci/ or mmio.py ── virtio transport ── device (parts.py)
```

What lives from power-on to power-off is the `VM`; all else stays. A reset is both, and nothing of
the old processors' state can survive it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from vdev.registers import Bus
from vdev.vmm import cpuid
from vdev.vmm.acpi import tables
from vdev.vmm.acpi.platform import Platform
from vdev.vmm.acpi.registers import Event
from vdev.vmm.boot import open_initrd, open_kernel
from vdev.vmm.config import MachineConfig
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import ACPI_BASE, RESET_VECTOR, VMGENID
from vdev.vmm.mmio import MmioFunction
from vdev.vmm.pci.bus import SLOTS
from vdev.vmm.plugs import Plugs
from vdev.vmm.power import RESET_CODE, Power
from vdev.vmm.ram import Ram
from vdev.vmm.serial import Serial
from vdev.vmm.tracker import Tracker
from vdev.vmm.vm import VM, Exit, open_kvm


class Callbacks(NamedTuple):
    """Who hears of what the guest does. ejected: it has let go of a slot, asked or unasked."""

    output: Callable[[bytes], None]
    shutdown: Callable[[], None]
    reset: Callable[[], None]
    panic: Callable[[], None]
    ejected: Callable[[int], Awaitable[None]]
    vcpu_ended: Callable[[Exit], None]


class Board:
    """Opened by `open`, within a running event loop; `close` it when it is off."""

    ram: Ram
    serial: Serial
    power: Power
    plugs: Plugs
    tracker: Tracker

    def __init__(self, config: MachineConfig, callbacks: Callbacks) -> None:
        self._config = config
        self._callbacks = callbacks
        self._stack = contextlib.ExitStack()
        self.vm: VM | None = None

    def open(self, ram: Callable[[], Ram]) -> None:
        """Everything that can fail by its user's mistake fails here, the cheapest first.

        ram: makes it, once the kernel is known to fit. Raises UserError.
        """
        config, stack = self._config, self._stack
        self._kernel = open_kernel(config.kernel)
        stack.callback(self._kernel.close)
        self._initrd = open_initrd(config.initrd) if config.initrd else None
        if self._initrd is not None:
            stack.callback(self._initrd.close)
        self._kernel.place(
            memory_size=config.memory,
            initrd=self._initrd,
            cmdline=config.cmdline,
            rsdp=ACPI_BASE,
        )
        self._kvm = open_kvm()
        stack.callback(os.close, self._kvm)
        self._offered = cpuid.supported(self._kvm)
        self.ram = ram()
        stack.callback(self.ram.close)
        self._bus = Bus()
        stack.callback(self._bus.close)
        self._interrupts = Interrupts()
        stack.callback(self._interrupts.close)
        self.serial = Serial(self._bus, self._interrupts, self._callbacks.output)
        stack.callback(self.serial.close)
        self.power = Power(
            self._bus,
            self._interrupts,
            shutdown=self._callbacks.shutdown,
            reset=self._callbacks.reset,
            panic=self._callbacks.panic,
            ejected=self._callbacks.ejected,
        )
        stack.callback(self.power.close)
        self.plugs = Plugs(
            self._bus, self._interrupts, self.ram.memory, pci=config.transport == "pci"
        )
        stack.callback(self.plugs.close)
        self.tracker = Tracker(self.ram, self.plugs)

    def close(self) -> None:
        """The machine is off, and its devices have been unplugged."""
        self._stack.close()

    @property
    def running(self) -> VM:
        """The VM of a machine that is on."""
        assert self.vm is not None, "the machine is not on"
        return self.vm

    def power_on(self) -> None:
        """A new VM whose processor stands at the kernel's first instruction.

        Raises UserError where the kernel can no longer be read, OSError where KVM refuses.
        """
        config = self._config
        vm = self._new_vm()
        entry = self._kernel.load(
            self.ram,
            memory_size=config.memory,
            initrd=self._initrd,
            cmdline=config.cmdline,
            rsdp=ACPI_BASE,
        )
        self.ram.write(RESET_VECTOR, RESET_CODE)
        self.ram.write(ACPI_BASE, tables.build(self._platform()))
        self.ram.write(VMGENID, os.urandom(16))
        vm.vcpus[0].enter(entry)
        vm.start()

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `save` gave, into the devices that have been plugged in and into a new VM, whose
        processors stand where they stood; then `power_on_restored`.

        Raises AttributeError, KeyError, TypeError or ValueError where it is no such state, OSError
        where this KVM does not take it.
        """
        from vdev.vmm.snapshot import unpack

        if len(state["vcpus"]) != self._config.cpus:
            raise ValueError("state of other processors than there are")
        # It is there first: only KVM knows which interrupts can be routed.
        vm = self._new_vm()
        self.power.restore(state["power"])
        self.plugs.restore(state["devices"])
        vm.load(unpack(state["vm"]))
        for vcpu, saved in zip(vm.vcpus, state["vcpus"], strict=True):
            vcpu.load(unpack(saved))
        # What interrupts, after the state of the controllers, which would undo it.
        self.serial.restore(unpack(state["serial"]))

    def power_on_restored(self) -> None:
        """Its processors may run. Raises OSError where there can be no threads."""
        self.ram.write(VMGENID, os.urandom(16))
        self.power.raise_event(Event.GENERATION_CHANGED)
        self.running.start()

    async def power_off(self) -> None:
        """The vCPUs end, whatever they do."""
        vm, self.vm = self.vm, None
        if vm is None:
            return
        self.plugs.detach()
        self._interrupts.detach()
        await vm.close()
        self.serial.flush()

    async def reset(self) -> None:
        """Off, everything as at power-on, and on."""
        await self.power_off()
        await self.plugs.reset()
        self.serial.reset()
        self.power.reset()
        self.power_on()

    async def stand_still(self) -> None:
        """No vCPU runs, and no request of a device is under way."""
        await self.running.pause()
        await self.plugs.suspend()

    async def go_on(self) -> None:
        """After `power_on`, or `stand_still`."""
        await self.plugs.resume()
        self.running.resume()

    def save(self) -> dict[str, Any]:
        """All but RAM and disks, while it stands still."""
        from vdev.vmm.snapshot import pack

        return {
            "vm": pack(self.running.save()),
            "vcpus": [pack(vcpu.save()) for vcpu in self.running.vcpus],
            "serial": pack(self.serial.save()),
            "power": self.power.save(),
            "devices": self.plugs.save(),
        }

    def _new_vm(self) -> VM:
        vm = VM(self._kvm, self._bus, self.ram.memory, self._callbacks.vcpu_ended)
        self.vm = vm
        self._interrupts.attach(vm)
        self.plugs.attach(vm)
        self.tracker.attach(vm)
        cpus = self._config.cpus
        for apic_id in range(cpus):
            vm.add_vcpu(apic_id, *cpuid.of_vcpu(self._offered, apic_id, cpus))
        return vm

    def _platform(self) -> Platform:
        functions = [plugged.function for plugged in self.plugs]
        pci = self.plugs.pci is not None
        return Platform(
            cpus=tuple(range(self._config.cpus)),
            mmio_devices=tuple(f.described for f in functions if isinstance(f, MmioFunction)),
            pci=pci,
            hotplug_slots=range(1, SLOTS) if pci else range(0),
            vmgenid_address=VMGENID,
            pvpanic=True,
            serial=True,
        )
