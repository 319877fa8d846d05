"""A machine of ours with a guest in it, driven by a shell on the guest's console.

    async with booted(config_of(material.generic, disks=(…,))) as guest:
        print(await guest.sh("uname -r"))
        await guest.machine.power_button()

A boot takes seconds in the KVM lab: one guest serves for many checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from tests.lab import innermost
from tests.lab.innermost import Bootable
from vdev.vmm.api import Outcome
from vdev.vmm.config import MachineConfig
from vdev.vmm.machine import Machine

T = TypeVar("T")

MIB = 1 << 20
READY = b"GUEST READY\r\n"
GUARD = 60.0
"""Seconds; against a hang, far above what any step needs."""
_LAST = 4000
_MARK_MOST = 4096
"""Bytes of the longest mark."""
_SHELL = "stty -echo -onlcr; dmesg -n 1; echo SHELL READY; exec sh /dev/console"
_SHELL_READY = b"SHELL READY\n"


class GuestError(Exception):
    """A guest did not do what was expected of it; the end of its console follows."""


def config_of(bootable: Bootable, **fields: Any) -> MachineConfig:
    """A machine with one of Debian's kernels.

    words: more words for the command line.  script: what the guest runs, a shell on its console by
    default.  end: what it does after that.  bzimage: whether it boots the compressed kernel.  The
    rest are fields of `MachineConfig`.
    """
    console = {"serial": "ttyS0", "virtio": "hvc0"}[fields.get("console", "serial")]
    words = fields.pop("words", "")
    script = innermost.script(fields.pop("script", _SHELL), fields.pop("end", "poweroff"))
    kernel = bootable.bzimage if fields.pop("bzimage", False) else bootable.vmlinux
    return MachineConfig(
        **{
            "name": "guest",
            "kernel": str(kernel),
            "initrd": str(bootable.initrd),
            "cmdline": f"console={console} quiet panic=-1 {words} {script}",
            "memory": 256 * MIB,
            **fields,
        }
    )


class Guest:
    """What runs in a machine, seen by its console."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.said = bytearray()
        """All that came by the console."""
        self._read_to = 0
        self._commands = 0
        self._news = asyncio.Event()
        self._shell = asyncio.Lock()

    async def watch(self) -> None:
        """Collects the console until the machine ends."""
        async for data in self.machine.console.attach():
            self.said += data
            self._news.set()
        self._news.set()

    async def until(self, mark: bytes | re.Pattern[bytes]) -> bytes:
        """What the guest says up to and with the next `mark`; raises GuestError without one."""
        pattern = re.compile(re.escape(mark)) if isinstance(mark, bytes) else mark

        async def come() -> bytes:
            looked = self._read_to
            while True:
                self._news.clear()
                # Not from the start each time: a console brings a flood in thousands of pieces.
                found = pattern.search(self.said, max(self._read_to, looked - _MARK_MOST))
                looked = len(self.said)
                if found:
                    start, self._read_to = self._read_to, found.end()
                    return bytes(self.said[start : found.end()])
                if self.machine.state.value == "ended" and not self._news.is_set():
                    raise GuestError(f"the machine ended before the guest said {pattern.pattern!r}")
                await self._news.wait()

        return await within(come(), f"the guest did not say {pattern.pattern!r}")

    async def shell(self) -> None:
        """Waits until `sh` can be used."""
        await self.until(_SHELL_READY)

    async def sh(self, command: str, *, code: int = 0) -> str:
        """Runs a command in the guest's shell and returns what it wrote; `code`: what it exits
        with. Its standard input is empty; lines are shorter than 4 KiB."""
        async with self._shell:
            self._commands += 1
            mark = f"<{self._commands} "
            await self.type(f"{{ {command}\n}} </dev/null 2>&1; echo '{mark}'$?'>'\n".encode())
            said = await self.until(re.compile(re.escape(mark.encode()) + rb"(\d+)>\r?\n"))
        output, _, exited = said.decode(errors="replace").rpartition(mark)
        if int(exited.strip(">\r\n")) != code:
            raise GuestError(f"`{command}`: exit code {exited.strip()[:-1]}, not {code}:\n{output}")
        return output.replace("\r", "")

    async def type(self, data: bytes) -> None:
        """Types on the console."""
        await within(self.machine.console.write(data), "the guest takes no input")

    async def reset(self) -> None:
        """Presses the machine's reset button, and waits for the shell of the next boot."""
        await within(self.machine.reset(), "it cannot be reset")
        await self.shell()

    async def end(self) -> Outcome:
        """How the machine ends."""
        return await within(self.machine.wait(), "the machine did not end")

    async def power_off(self) -> Outcome:
        """Has the guest switch itself off."""
        await self.type(b"poweroff -f\n")
        return await self.end()


async def within(work: Awaitable[T], what: str) -> T:
    """Guards against a hang: GuestError with `what`."""
    try:
        return await asyncio.wait_for(work, GUARD)
    except TimeoutError:
        raise GuestError(f"{what} within {GUARD:g} s") from None


async def eventually(check: Callable[[], T], what: str) -> T:
    """What `check` returns, once that is true: for states that announce themselves to nobody."""

    async def come() -> T:
        while not (value := check()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return value

    return await within(come(), what)


@contextlib.asynccontextmanager
async def started(config: MachineConfig) -> AsyncIterator[Guest]:
    """A machine that has just been switched on; an error shows the end of its console."""
    async with Machine(config) as machine:
        guest = Guest(machine)
        watching = asyncio.ensure_future(guest.watch())
        try:
            await machine.start()
            yield guest
        except Exception as error:
            said = bytes(guest.said[-_LAST:]).decode(errors="replace").replace("\r", "")
            error.add_note(f"state: {machine.info()}\nthe end of its console:\n{said}")
            raise
        finally:
            await machine.stop()
            await watching


@contextlib.asynccontextmanager
async def booted(config: MachineConfig) -> AsyncIterator[Guest]:
    """A guest whose shell waits for commands."""
    async with started(config) as guest:
        await guest.shell()
        yield guest
