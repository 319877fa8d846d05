"""Machines as programs: which VMM runs one, QEMU with our devices, the control socket, the run."""
