"""Guests of the lab (tests/lab) as clients: a stock Debian kernel in QEMU, fio and iperf3 in it.

Each target is one guest of one virtual CPU with one device under test; its root file system is
an ordinary disk of QEMU's, read-only, the same for all. The device is served beside QEMU
(vhost-user) or within it (virtio-blk in an iothread, virtio-net in the main loop). The virtual CPU
has the client's core to itself; all else, who serves and QEMU's main loop, is on the server's, as
one pins virtual CPUs and emulator in production. On the virtual CPU's core the main loop, which
delivers an emulated guest's interrupts, would halve what a server beside QEMU can do. What serves
within QEMU is told apart from the rest of QEMU by its threads.

    steps     a loop of one's own for the lab, stepped from synchronous code
    vmm       QEMU's threads: which is which, their cores and their CPU time
    backend   who serves the device: beside QEMU, or within
    target    one guest with one device, at rest but while it is measured
    boot      a guest with these devices
    blk       fio on a disk
    wire      a network namespace with a bridge, the host's end of the network
    net       iperf3, ping and a checked stream over a network card
    echo      the host's end of the checked stream, a program
"""
