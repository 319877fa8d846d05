"""The guest lab: a stock Debian kernel and userland in QEMU, on devices that vdev serves.

One noun a file, from the host upwards:

    process   programs of the host: run to the end, or kept running and surely ended
    host      what this machine can do (accelerator, root, tun) and what it lacks
    cache     things that are costly to make, made once and kept
    kernel    Debian's kernel package, unpacked, not installed
    initrd    busybox and the few modules that find the root disk
    rootfs    a Debian userland with the tools that the tests run, as an ext4 image
    image     disk images: copies of the root file system, blank disks
    agent     commands for the guest over its second serial port
    qmp       QEMU's monitor
    devices   what is plugged into a machine
    qemu      one virtual machine
    server    one `vdev serve` process
    network   names and addresses that clash with nothing
    lab       all of it together: ``async with Lab(...) as lab, lab.boot(...) as guest``

The KVM lab, a machine with a /dev/kvm that works wherever QEMU does:

    cpio         files to append to an initrd
    innermost    what is booted on that KVM: kernels and an initrd
    outer        the machine itself, on the host's root
    kvm          ``python -m tests.lab.kvm -- COMMAND``
    inner_tests  a pytest plugin: tests/vmm/kvm run in there as tests of the outer run
    relay        its other half, inside
"""
