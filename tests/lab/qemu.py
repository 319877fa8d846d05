"""One virtual machine: QEMU with shared memory, so that other processes can serve its devices.

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
from .devices import Device
from .process import Process, running, tail
from .qmp import Qmp, QmpError

# Guards against a hang, far above what any step needs; not a statement about speed.
BOOT_TIMEOUT = 180.0
RUN_TIMEOUT = 180.0
_END_TIMEOUT = 2.0


class GuestError(Exception):
    """The guest died, hung, or a command in it failed; the message holds the end of its console."""


@dataclass(frozen=True)
class Machine:
    """All that QEMU is told."""

    kernel: Path
    initrd: Path
    disks: Sequence[Device]
    nics: Sequence[Device] = ()
    cpus: int = 2
    memory_mib: int = 512
    cmdline: str = ""
    arguments: Sequence[str] = ()
    """What comes before the devices, which may be plugged into it."""
    incoming: Path | None = None
    """The socket on which another QEMU sends the guest, instead of a boot."""
    program: Sequence[str] = ("qemu-system-x86_64",)

    def command(self, console: Path, agent_fd: int, monitor_fd: int) -> list[str]:
        """The command line."""
        accelerator = host.accelerator()
        kvm = accelerator == "kvm"
        command = [
            *self.program,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,memory-backend=ram,usb=off,smbus=off,sata=off,hpet=off"),
            *("-accel", "kvm" if kvm else "tcg,thread=multi"),
            *("-cpu", "host" if kvm else "max"),
            # For a machine that can only have one CPU TCG leaves out memory barriers, and such a
            # guest and the thread that serves its device miss each other's notifications.
            *("-smp", f"{self.cpus},maxcpus={max(self.cpus, 2)}"),
            *("-m", str(self.memory_mib)),
            "-object",
            f"memory-backend-memfd,id=ram,size={self.memory_mib}M,share=on",
            *("-kernel", str(self.kernel), "-initrd", str(self.initrd)),
            *("-append", self._cmdline()),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent_fd}", "-serial", "chardev:agent"),
            *("-chardev", f"socket,id=monitor,fd={monitor_fd}"),
            *("-mon", "chardev=monitor,mode=control"),
            *self.arguments,
        ]
        for index, disk in enumerate(self.disks):
            command += disk.arguments(index, kvm=kvm)
        for index, nic in enumerate(self.nics):
            command += nic.arguments(index, kvm=kvm)
        if self.incoming is not None:
            command += ["-incoming", f"unix:{self.incoming}"]
        return command

    def _cmdline(self) -> str:
        # A panic ends QEMU (with -no-reboot) instead of leaving a guest that never answers.
        return f"console=ttyS0 loglevel=4 panic=-1 root=/dev/vda {self.cmdline}".strip()


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

    def event(self, name: str) -> asyncio.Future[None]:
        """Done when something in the guest next writes ``event NAME`` to the agent's port.

        Fails with AgentClosed when the guest is gone.
        """
        return self._agent.event(name)

    async def migrate(self, to: Path) -> None:
        """Send the guest, while it runs, to the QEMU that waits on this socket."""
        events = {"capability": "events", "state": True}
        await self.monitor.execute("migrate-set-capabilities", capabilities=[events])
        # A guest that writes faster than a busy host copies would never be still enough to go.
        await self.monitor.execute("migrate-set-parameters", **{"downtime-limit": 10_000})
        await self.monitor.execute("migrate", uri=f"unix:{to}")
        over = self.monitor.event(
            "MIGRATION", lambda data: data["status"] in ("completed", "failed", "cancelled")
        )
        if (await over)["status"] != "completed":
            why = await self.monitor.execute("query-migrate")
            raise GuestError(f"the guest did not migrate: {why}")

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
            if machine.incoming is None:
                await asyncio.wait_for(agent.ready(), BOOT_TIMEOUT)
        except (AgentClosed, OSError, QmpError, TimeoutError):
            raise await guest.died("the guest did not boot") from None
        yield guest


def _pair(stack: contextlib.AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs
