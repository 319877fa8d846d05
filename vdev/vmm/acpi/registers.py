"""The registers through which the DSDT and the machine talk of events and of hot-plugged slots.

Four little-endian dwords in I/O space at `vdev.vmm.layout.HOTPLUG_PORT`, always accessed whole:

```
offset  name       read                                  write
0       EVENTS     pending events, see Event             ones clear those bits
4       INSERTED   slots that were filled                ones clear those bits
8       REQUESTED  slots that the machine wants back     ones clear those bits
12      EJECT      0                                     1 << slot: the guest has let go of it
```

A slot is the number of a PCI device on bus 0. To tell of something, the machine sets the bit of the
slot if it has one, then the bit of the event, then raises an edge on `vdev.vmm.layout.GED_GSI`, in
this order. The guest (the _EVT of the Generic Event Device) clears the events it has read before
it looks at slots, and clears of those only what it has read: what comes in between raises another
edge, and nothing is lost. An edge without a pending event means nothing.

A slot without a function answers all ones in its config space; a guest that was told of it then
finds nothing there. Removal goes: REQUESTED, the guest's driver leaves the function, EJECT, the
machine removes it. A guest may write EJECT unasked, for any slot: that is its right for its own
functions.

The sleep control register (ACPI 6.3, 4.8.3.7) is one byte: SLP_EN with the type of S5 in SLP_TYP
is the guest's way to switch the machine off; see `SLEEP_S5`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Register(IntEnum):
    """Offsets from HOTPLUG_PORT."""

    EVENTS = 0
    INSERTED = 4
    REQUESTED = 8
    EJECT = 12


class Event(IntFlag):
    """Bits of EVENTS."""

    POWER_BUTTON = 1 << 0
    SLOTS_INSERTED = 1 << 1
    SLOTS_REQUESTED = 1 << 2
    GENERATION_CHANGED = 1 << 3
    CPUS = 1 << 4
    """Reserved: the guest clears it and does nothing."""


S5_TYPE = 5
SLEEP_ENABLE = 1 << 5
SLEEP_S5 = SLEEP_ENABLE | S5_TYPE << 2
"""What the guest writes to the sleep control register in order to switch the machine off."""
