"""One virtual machine: QEMU with shared memory, whose devices are vhost-user sockets.

The console, the agent's port and the monitor are sockets or files that exist before QEMU does,
so that there is nothing to wait for by polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import host
from .agent import Agent, AgentClosed, Result
from .process import Process, running, tail
from .qmp import Qmp, QmpError

# Guards against a hang, far above what any step needs; not a statement about speed.
BOOT_TIMEOUT = 180.0
RUN_TIMEOUT = 180.0
_END_TIMEOUT = 2.0


class GuestError(Exception):
    """The guest died, hung, or a command in it failed; the message holds the end of its console."""


@dataclass(frozen=True)
class Disk:
    """A vhost-user-blk device of the machine."""

    socket: Path
    queues: int = 1
    options: str = ""


@dataclass(frozen=True)
class Nic:
    """A vhost-user-net device of the machine."""

    socket: Path
    mac: str
    queues: int = 1
    mtu: int | None = None
    options: str = ""


@dataclass(frozen=True)
class Machine:
    """All that QEMU is told."""

    kernel: Path
    initrd: Path
    disks: Sequence[Disk]
    nics: Sequence[Nic] = ()
    cpus: int = 2
    memory_mib: int = 512
    cmdline: str = ""
    arguments: Sequence[str] = ()

    def command(self, console: Path, agent_fd: int, monitor_fd: int) -> list[str]:
        """The command line."""
        accelerator = host.accelerator()
        kvm = accelerator == "kvm"
        command = [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,memory-backend=ram,usb=off,smbus=off,sata=off,hpet=off"),
            *("-accel", "kvm" if kvm else "tcg,thread=multi"),
            *("-cpu", "host" if kvm else "max"),
            *("-smp", str(self.cpus), "-m", str(self.memory_mib)),
            "-object",
            f"memory-backend-memfd,id=ram,size={self.memory_mib}M,share=on",
            *("-kernel", str(self.kernel), "-initrd", str(self.initrd)),
            *("-append", self._cmdline()),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent_fd}", "-serial", "chardev:agent"),
            *("-chardev", f"socket,id=monitor,fd={monitor_fd}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]
        for index, disk in enumerate(self.disks):
            command += _disk(index, disk)
        for index, nic in enumerate(self.nics):
            command += _nic(index, nic, kvm)
        return [*command, *self.arguments]

    def _cmdline(self) -> str:
        # A panic ends QEMU (with -no-reboot) instead of leaving a guest that never answers.
        return f"console=ttyS0 loglevel=4 panic=-1 root=/dev/vda {self.cmdline}".strip()


def _disk(index: int, disk: Disk) -> list[str]:
    options = f",{disk.options}" if disk.options else ""
    return [
        *("-chardev", f"socket,id=disk{index},path={disk.socket}"),
        "-device",
        # Names in the guest follow the slots: the first disk is vda.
        f"vhost-user-blk-pci,chardev=disk{index},num-queues={disk.queues},"
        f"addr={0x10 + index:#x}{options}",
    ]


def _nic(index: int, nic: Nic, kvm: bool) -> list[str]:
    options = "" if nic.queues == 1 else ",mq=on"
    if nic.mtu is not None:
        options += f",host_mtu={nic.mtu}"
    if not kvm:
        # QEMU 7.2's TCG crashes when a vhost-user-net device with MSI-X starts.
        options += ",vectors=0"
    if nic.options:
        options += f",{nic.options}"
    return [
        *("-chardev", f"socket,id=nic{index},path={nic.socket}"),
        *("-netdev", f"vhost-user,id=net{index},chardev=nic{index},queues={nic.queues}"),
        "-device",
        f"virtio-net-pci,netdev=net{index},mac={nic.mac},romfile=,addr={8 + index:#x}{options}",
    ]


class Guest:
    """A machine that has booted."""

    def __init__(self, process: Process, agent: Agent, monitor: Qmp, console: Path) -> None:
        self.process = process
        self.monitor = monitor
        self.console = console
        self._agent = agent

    async def run(self, command: str, *, limit: float = RUN_TIMEOUT, check: bool = True) -> Result:
        """Run a shell command; unless told otherwise, one that fails is an error."""
        try:
            result = await asyncio.wait_for(self._agent.run(command), limit)
        except TimeoutError:
            raise await self.died(f"no answer within {limit:.0f} s to: {command}") from None
        except (AgentClosed, OSError):
            raise await self.died(f"the guest died during: {command}") from None
        if check and result.code:
            raise GuestError(f"exit code {result.code} of: {command}\n{result.output}")
        return result

    async def shutdown(self) -> None:
        """Bring the file systems to rest and switch the machine off."""
        with contextlib.suppress(AgentClosed, OSError):
            # SysRq: sync, remount read-only, off. There is no init system to ask.
            await self._agent.run("sync; for key in s u o; do echo $key >/proc/sysrq-trigger; done")
        code = await asyncio.wait_for(self.process.wait(), RUN_TIMEOUT)
        if code:
            raise self.process.ended("while the guest was switched off")

    async def kill(self) -> None:
        """End QEMU by SIGKILL, as a crash would."""
        await self.process.kill()

    async def died(self, what: str) -> GuestError:
        """The error to raise, with all there is to know about it."""
        with contextlib.suppress(TimeoutError):
            # A port is closed a moment before the process has ended.
            await asyncio.wait_for(self.process.wait(), _END_TIMEOUT)
        return GuestError(
            f"{what}\nQEMU's exit code: {self.process.returncode}; the end of its log:\n"
            f"{tail(self.process.log)}\nthe end of the console:\n{tail(self.console)}"
        )


@contextlib.asynccontextmanager
async def booted(machine: Machine, name: str, directory: Path) -> AsyncIterator[Guest]:
    """A guest whose agent answers; QEMU is gone at the end of the block."""
    console = directory / f"{name}.console"
    async with contextlib.AsyncExitStack() as stack:
        agent_port, agent_fd = _pair(stack)
        monitor_port, monitor_fd = _pair(stack)
        process = await stack.enter_async_context(
            running(
                "qemu",
                machine.command(console, agent_fd.fileno(), monitor_fd.fileno()),
                directory / f"{name}.qemu.log",
                pass_fds=(agent_fd.fileno(), monitor_fd.fileno()),
            )
        )
        # QEMU's own copies must be the last ones: the end of QEMU is seen as the end of file.
        agent_fd.close()
        monitor_fd.close()
        agent = await Agent.connect(agent_port)
        stack.push_async_callback(agent.close)
        monitor = await Qmp.open(monitor_port)
        stack.callback(monitor.close)
        guest = Guest(process, agent, monitor, console)
        try:
            await monitor.negotiate()
            await asyncio.wait_for(agent.ready(), BOOT_TIMEOUT)
        except (AgentClosed, OSError, QmpError, TimeoutError):
            raise await guest.died("the guest did not boot") from None
        yield guest


def _pair(stack: contextlib.AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs
