"""``vdev run``: a machine in the foreground with its console on the terminal, or detached."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vdev.cli import EXIT_OK, EXIT_USER_ERROR
from vdev.cli.terminal import Terminal, parse_escape
from vdev.errors import UserError
from vdev.machines.choice import choose_vmm
from vdev.machines.control import log_path
from vdev.machines.run import Front, run_machine, without_front
from vdev.tables import parse_options
from vdev.units import parse_size
from vdev.vmm.api import Outcome, VirtualMachine
from vdev.vmm.config import (
    DiskConfig,
    MachineConfig,
    NicConfig,
    SandboxConfig,
    ShareConfig,
    VhostUserConfig,
    VsockConfig,
)
from vdev.vmm.decode import load_machine
from vdev.vmm.host import check_host

if TYPE_CHECKING:
    from vdev.vmm.snapshot import Snapshot

T = TypeVar("T")

_READY = b"\0"
_MACHINE_OPTIONS = (
    "kernel",
    "initrd",
    "append",
    "cpus",
    "memory",
    "hugepages",
    "disk",
    "net",
    "share",
    "vhost_user",
    "vsock",
    "console",
    "balloon",
    "no_reboot",
    "transport",
    "no_sandbox",
)


def run(arguments: Namespace) -> int:
    """Exit code: the outcome's."""
    config, snapshot = _source(arguments)
    escape = parse_escape(arguments.escape)
    handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler.terminator = "\r\n"  # the terminal may be raw
    logging.basicConfig(format="vdev: %(message)s", level=logging.INFO, handlers=[handler])
    if arguments.detach:
        return _detached(config, snapshot, arguments)

    @contextlib.asynccontextmanager
    async def front(machine: VirtualMachine) -> AsyncIterator[None]:
        terminal = Terminal(escape, machine.console.resize)
        if terminal.is_tty and escape is not None:
            _say(f"{config.name} runs; {arguments.escape} ends it")
        task = asyncio.ensure_future(_converse(terminal, machine))
        try:
            yield
            # What it wrote last is shown before we go.
            await asyncio.wait([task], timeout=2)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    outcome = _run(config, front, arguments.loop, snapshot)
    if outcome.exit_code or outcome.detail:
        _say(f"{config.name}: {outcome}")
    return outcome.exit_code


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone away; the machine goes on
        print(f"vdev: {text}", file=sys.stderr)


def _source(arguments: Namespace) -> tuple[MachineConfig, Snapshot | None]:
    """What to run, and where it goes on from."""
    if arguments.restore is None:
        for name in ("disks", "clone"):
            if getattr(arguments, name):
                raise UserError(f"--{name} goes with --restore")
        return machine_config(arguments), None
    if arguments.config is not None or _given(arguments):
        raise UserError("--restore: the snapshot says what the machine is made of")
    from vdev.vmm import snapshot as snapshots

    snapshot = snapshots.read(arguments.restore)
    config = snapshots.config_of(
        snapshot, name=arguments.name, disks=arguments.disks, clone=arguments.clone
    )
    if arguments.vmm is not None:
        config = dataclasses.replace(config, vmm=arguments.vmm)
    if arguments.no_sandbox:
        config = dataclasses.replace(config, sandbox=SandboxConfig(enabled=False))
    return config, snapshot


def _given(arguments: Namespace) -> list[str]:
    return [name for name in _MACHINE_OPTIONS if getattr(arguments, name)]


def machine_config(arguments: Namespace) -> MachineConfig:
    """What the options or the file say. Raises UserError."""
    chosen = {name: getattr(arguments, name) for name in ("name", "vmm")}
    changes = {name: value for name, value in chosen.items() if value is not None}
    if arguments.config is not None:
        if given := _given(arguments):
            raise UserError(
                f"{arguments.config} describes the whole machine: --{given[0].replace('_', '-')} "
                "belongs into it"
            )
        return load_machine(arguments.config, **changes)
    if arguments.kernel is None:
        raise UserError("give --kernel, or a CONFIG.toml that describes the machine")

    def each(cls: type[T], texts: list[str], first: str | None, option: str) -> tuple[T, ...]:
        return tuple(parse_options(cls, text, first, f"--{option}: ") for text in texts)

    vsock = each(VsockConfig, [arguments.vsock] if arguments.vsock else [], "cid", "vsock")
    return MachineConfig(
        **{"name": f"vm-{os.getpid()}", **changes},
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        cmdline=arguments.append or "",
        cpus=1 if arguments.cpus is None else arguments.cpus,
        memory=parse_size(arguments.memory or "512M"),
        hugepages=arguments.hugepages,
        disks=each(DiskConfig, arguments.disk, "path", "disk"),
        nics=each(NicConfig, arguments.net, None, "net"),
        shares=each(ShareConfig, arguments.share, "directory", "share"),
        vhost_user=each(VhostUserConfig, arguments.vhost_user, "socket", "vhost-user"),
        vsock=vsock[0] if vsock else None,
        console=arguments.console or "serial",
        balloon=arguments.balloon,
        reboot=not arguments.no_reboot,
        transport=arguments.transport or "pci",
        sandbox=SandboxConfig(enabled=not arguments.no_sandbox),
    )


async def _converse(terminal: Terminal, machine: VirtualMachine) -> None:
    try:
        if not await terminal.converse(machine.console.attach(), machine.console.write):
            return
    except Exception:
        # A fault of ours: better no machine than one that nobody can reach.
        logging.getLogger("vdev").exception("the console of %s failed", machine.config.name)
    await machine.stop()


def _run(config: MachineConfig, front: Front, loop: str, snapshot: Snapshot | None) -> Outcome:
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(run_machine(config, front, snapshot))


def _detached(config: MachineConfig, snapshot: Snapshot | None, arguments: Namespace) -> int:
    """Returns once the machine runs; its process is a session of its own from then on."""
    choose_vmm(config)
    check_host(config)
    log = log_path(config.name)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_daemon(config, snapshot, arguments, log, writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as ready:
        if ready.read(1) == _READY:
            print(config.name)
            return EXIT_OK
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _daemon(
    config: MachineConfig,
    snapshot: Snapshot | None,
    arguments: Namespace,
    log: Path,
    ready: int,
) -> int:
    """Its mistakes go to the terminal until it runs, to its log from then on."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    is_new = not log.exists()

    @contextlib.asynccontextmanager
    async def front(machine: VirtualMachine) -> AsyncIterator[None]:
        os.dup2(messages, 1)
        os.dup2(messages, 2)
        os.close(messages)
        os.write(ready, _READY)
        os.close(ready)
        async with without_front(machine):
            yield

    try:
        # Now, since the process may be confined by the time when its machine runs.
        messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        outcome = _run(config, front, arguments.loop, snapshot)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"vdev: {line}", file=sys.stderr, flush=True)
        if is_new:
            with contextlib.suppress(OSError):
                log.unlink()
        return EXIT_USER_ERROR
    except BaseException:
        logging.getLogger("vdev").exception("machine %s failed", config.name)
        return 1
    logging.getLogger("vdev").info("machine %s: %s", config.name, outcome)
    return outcome.exit_code
