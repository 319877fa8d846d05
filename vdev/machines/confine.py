"""Confining the process of ``vdev run``: its cgroup, its keeper and dialer, its sandbox.

What happens when:

1. `kept` puts the process into its cgroup and forks the keeper, and the dialer where devices are
   served by others, before anything is opened.
2. The machine is built and its control socket listens: everything is open, and no thread runs.
3. `confine` enters the sandbox.
4. The machine starts its threads, which inherit it, and the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import vdev
from vdev.machines.keeper import Keeper
from vdev.runtime import runtime_dir
from vdev.vmm.api import VirtualMachine
from vdev.vmm.config import LimitsConfig, MachineConfig
from vdev.vmm.sandbox import KeptPath, Sandbox, SandboxOptions, other_threads

if TYPE_CHECKING:
    from vdev.vmm.cgroup import Cgroup, CgroupLimits

_log = logging.getLogger("vdev.machine")

NEEDED = ("binascii",)
"""Extension modules, which cannot be mapped any more afterwards, of modules that are imported when
they are needed; the rest of them is imported by then."""
_ENDING = 1000
"""Milliseconds that a thread which was joined may take to be gone."""


@contextlib.contextmanager
def kept(machine: VirtualMachine) -> Iterator[None]:
    """Limits this process, and tidies up behind it, for the length of the block and beyond.

    Raises UserError where there can be no such cgroup.
    """
    config = machine.config
    if machine.vmm != "kvm" or not (config.sandbox.enabled or config.limits.any):
        yield
        return
    group = _limited(machine) if config.limits.any else None
    socket = runtime_dir() / f"{config.name}.{os.getpid()}.sock"

    def tidy() -> None:
        from vdev.net.wiring import sweep

        socket.unlink(missing_ok=True)
        asyncio.run(sweep())

    def afterwards() -> None:
        if group is not None:
            from vdev.vmm.cgroup import Cgroup

            # It is our own too. Where a parent hands on controllers it takes nobody back; then
            # the next machine of that name removes it.
            Cgroup(group.path.parent).add(os.getpid())
            group.remove()

    keeper = Keeper(tidy, afterwards)
    sockets = [device.socket for device in config.vhost_user]
    sockets += [nic.socket for nic in config.nics if nic.socket is not None]
    dialer = None
    if sockets:
        from vdev.machines.dialer import Dialer

        dialer = Dialer(sockets)
        machine.dial = dialer.connect
    try:
        yield
    finally:
        if dialer is not None:
            dialer.close()
        keeper.close()
        if machine.io_limit is not None:
            machine.io_limit.close()


def _limited(machine: VirtualMachine) -> Cgroup:
    """This process is in that cgroup then. Raises UserError where there can be none."""
    from vdev.vmm.cgroup import Cgroup
    from vdev.vmm.io_limit import IoLimit

    config = machine.config
    group = Cgroup.enter(config.name, limits_of(config))
    machine.cgroup = group.path
    if config.limits.io is not None:
        machine.io_limit = IoLimit(group.path, config.limits.io)
    return group


async def confine(machine: VirtualMachine) -> None:
    """Enters the sandbox that the machine's configuration asks for, if it does.

    Raises UserError where the host refuses what cannot be done without, and as that leaves a
    process with half its rights, it should end then.
    """
    config = machine.config.sandbox
    if machine.vmm != "kvm" or not config.enabled:
        return
    for module in NEEDED:
        importlib.import_module(module)
    await _alone()
    sandbox = Sandbox(
        SandboxOptions(
            user=config.user,
            namespaces=config.namespaces,
            own_root=config.namespaces,
            landlock=config.landlock,
            seccomp=config.seccomp,
        )
    )
    machine.sandbox = report = sandbox.enter(_kept_paths())
    lacks = [part for part in report.degraded if not part.endswith("not asked for")]
    if lacks:
        _log.warning("machine %s: its sandbox lacks: %s", machine.config.name, "; ".join(lacks))


def limits_of(config: MachineConfig) -> CgroupLimits:
    """The limits in a cgroup's words."""
    from vdev.vmm.cgroup import CgroupLimits

    limits: LimitsConfig = config.limits
    io: dict[str, dict[str, int]] | None = None
    if limits.io is not None:
        each = {"rbps": limits.io, "wbps": limits.io}
        io = {disk.path: each for disk in config.disks if not disk.path.startswith("null:")}
    return CgroupLimits(cpus=limits.cpu, memory=limits.memory, pids=limits.pids, io=io)


def _kept_paths() -> Iterator[KeptPath]:
    """Modules in Python that are imported later, and the service manager's socket."""
    for module in (os, vdev):
        assert module.__file__ is not None
        yield KeptPath(Path(module.__file__).parent)
    notify = os.environ.get("NOTIFY_SOCKET", "")
    if notify.startswith("/") and os.path.exists(notify):
        yield KeptPath(notify)


async def _alone() -> None:
    """A thread that was joined is still there for a moment."""
    for _ in range(_ENDING):
        if threading.active_count() > 1 or not other_threads():
            return
        await asyncio.sleep(0.001)
