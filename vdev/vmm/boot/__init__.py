"""From a kernel's file to a guest that stands at its first instruction.

```
open_kernel(path)           file.py     opened, held, read by ranges
  ├─ "HdrS" at 0x202        bzimage.py  the Linux 64-bit boot protocol
  └─ "\\x7fELF"              pvh.py      an ELF kernel with a Xen PVH note
Kernel.place(...)           kernel.py   where all goes; nothing of the guest is touched
Kernel.load(ram, ...)       kernel.py   segments, initrd, command line; then the image's `enter`
EntryState                  entry.py    what the first vCPU's registers are
```

A file is checked when it is opened, the rest (memory, initrd, command line) by `place`; after that
only an I/O error, or a file that shrank meanwhile, can stop `load`.
"""

from vdev.vmm.boot.entry import EntryState, GuestRam, Segment
from vdev.vmm.boot.kernel import Initrd, Kernel, Placement, open_initrd, open_kernel

__all__ = [
    "EntryState",
    "GuestRam",
    "Initrd",
    "Kernel",
    "Placement",
    "Segment",
    "open_initrd",
    "open_kernel",
]
