"""The KVM lab's own machine: QEMU emulates an AMD CPU with SVM, so that its Linux has a /dev/kvm.

That Linux runs on the host's root (read by 9p, changes stay in the machine's memory), with the
same paths, so that the checkout, its virtual environment and the host's tools work in there. A job
is a shell script; what it writes, its exit code and a directory of results come out.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import cpio, initrd
from .emulator import Emulator
from .kernel import Kernel
from .process import Process, ProcessError, T, running, tail, while_running
from .qmp import Qmp, QmpError

# Guards against a hang, far above what any step needs; not a statement about speed.
BOOT_TIMEOUT = 180.0
PROD = 1.0
"""Seconds between two interrupts from outside, which no CPU of the lab is left without."""
STILL = 120.0
"""Seconds without a word of one of the lab's CPUs, which has one every five."""
_BEAT_CHECK = 5.0
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console", "kvm-amd")
_APPLETS = ("cp", "insmod", "mkdir", "mount", "poweroff", "sh", "switch_root")
# Places in there that are not the host's but a tmpfs.
_OWN_PLACES = ("/tmp", "/run", "/dev")
_HERE = Path(__file__).parent

Sink = Callable[[bytes], None]


class LabError(Exception):
    """The lab did not boot, died, or took too long; the message says which, and its last words."""


class LabStandsStill(LabError):
    """A CPU of the lab does nothing any more: the emulation's fault, not the job's."""


@dataclass(frozen=True)
class Outer:
    """The machine and what it runs."""

    emulator: Emulator
    kernel: Kernel
    job: str
    """A shell script, run as root."""
    results: Path
    """A directory of the host that the job may write to, at the same place in there."""
    keep: tuple[Path, ...] = ()
    """Directories that the job needs even if they lie below /tmp or the like."""
    cpus: int = 2
    memory_mib: int = 4096
    console: Path | None = None
    """Where to write the console; in a temporary directory by default."""


@dataclass
class Streams:
    """Where output goes while it comes; ``terminal`` is for a shell, which has no other two."""

    out: Sink
    err: Sink
    events: Sink = field(default=lambda data: None)
    terminal: socket.socket | None = None


async def run(machine: Outer, streams: Streams, limit: float | None = None) -> int:
    """Boot, run the job to its end and return its exit code (as a shell counts it).

    ``limit``: the most seconds that the job may take. Raises LabError.
    """
    with tempfile.TemporaryDirectory(prefix="vdev-kvm-lab-") as temporary:
        directory = Path(temporary)
        console = machine.console or directory / "console"
        console.write_bytes(b"")
        try:
            return await _run(machine, streams, limit, directory, console)
        except _StandsStill as error:
            raise LabStandsStill(f"{error}\nthe end of its console:\n{tail(console)}") from None
        except (ProcessError, _TooLong) as error:
            raise LabError(f"{error}\nthe end of the lab's console:\n{tail(console)}") from None


class _TooLong(Exception):
    pass


class _StandsStill(Exception):
    pass


async def _run(
    machine: Outer, streams: Streams, limit: float | None, directory: Path, console: Path
) -> int:
    mark = b"\0" + secrets.token_hex(8).encode()
    base = await initrd.build(
        machine.kernel, MODULES, (_HERE / "outer_init.sh").read_text(), _APPLETS
    )
    files = {
        "job/job": machine.job.encode(),
        "job/main": (_HERE / "outer_main.sh").read_bytes(),
        "job/settings": _settings(machine, mark, streams.terminal is not None).encode(),
    }
    packed = await asyncio.to_thread(cpio.appended, base, files, directory / "initrd")
    async with contextlib.AsyncExitStack() as stack:
        ports = {
            name: await stack.enter_async_context(_port()) for name in ("out", "err", "events")
        }
        control = await stack.enter_async_context(_port())
        monitor, theirs = socket.socketpair()
        qmp = stack.enter_context(contextlib.closing(await Qmp.open(monitor)))
        fds = {name: port.theirs.fileno() for name, port in ports.items()}
        fds["control"] = control.theirs.fileno()
        stack.enter_context(theirs)
        terminal = streams.terminal.fileno() if streams.terminal else None
        qemu = await stack.enter_async_context(
            running(
                "the lab's QEMU",
                _command(machine, packed, console, fds, theirs.fileno(), terminal),
                directory / "qemu.log",
                pass_fds=(
                    *fds.values(),
                    theirs.fileno(),
                    *([] if terminal is None else [terminal]),
                ),
            )
        )
        # QEMU's own copies must be the last ones: the end of QEMU is seen as the end of file.
        for port in (*ports.values(), control):
            port.theirs.close()
        theirs.close()
        ready = _from(qemu, control.line(), "while the lab booted")
        await _within(BOOT_TIMEOUT, ready, "the lab did not boot")
        sinks = {"out": streams.out, "err": streams.err, "events": streams.events}
        if streams.terminal:
            sinks = {}
        copies = [ports[name].copy(sink, mark) for name, sink in sinks.items()]
        ended = _code(control, machine.cpus, asyncio.gather(*copies))
        job = _from(qemu, ended, "while the job ran")
        await asyncio.wait_for(qmp.negotiate(), BOOT_TIMEOUT)
        prodding = asyncio.ensure_future(_prod(control, qmp))
        try:
            return await _within(limit, job, "the job did not end")
        except (_StandsStill, _TooLong):
            (machine.results / "processors.log").write_text(await _processors(qmp, machine.cpus))
            raise
        finally:
            prodding.cancel()
            await asyncio.gather(prodding, return_exceptions=True)


async def _prod(control: _Port, qmp: Qmp) -> None:
    """Raises an interrupt of each CPU of the lab, again and again (see outer_main.sh)."""
    key = [{"type": "qcode", "data": "shift"}]
    while True:
        await asyncio.sleep(PROD)
        control.write(b"\n")
        await qmp.execute("send-key", keys=key)


async def _processors(qmp: Qmp, cpus: int) -> str:
    """What the lab's CPUs are at: their registers, twice, and their interrupt controllers."""
    commands = ["info registers -a", *(f"info lapic {cpu}" for cpu in range(cpus))]
    said = []
    try:
        for command in [*commands, commands[0]]:
            words = qmp.execute("human-monitor-command", **{"command-line": command})
            said.append(f"# {command}\n{await asyncio.wait_for(words, 10)}")
    except (QmpError, OSError, TimeoutError) as error:
        said.append(f"# the monitor does not answer: {error!r}")
    return "\n".join(said)


async def _code(control: _Port, cpus: int, copies: asyncio.Future[list[None]]) -> int:
    """What the job's exit code is; raises _StandsStill where a CPU is not alive any more."""
    seen = dict.fromkeys(range(cpus), time.monotonic())
    line = asyncio.ensure_future(control.line())
    try:
        while True:
            await asyncio.wait([line], timeout=_BEAT_CHECK)
            now = time.monotonic()
            if line.done():
                word, _, value = line.result().partition(" ")
                if word == "exit":
                    await copies
                    return int(value)
                seen[int(value)] = now
                line = asyncio.ensure_future(control.line())
            for cpu, last in seen.items():
                if now - last > STILL:
                    raise _StandsStill(f"CPU {cpu} of the lab stands still, for {STILL:g} s now")
    finally:
        line.cancel()
        copies.cancel()
        await asyncio.gather(line, copies, return_exceptions=True)


async def _from(qemu: Process, wanted: Awaitable[T], doing: str) -> T:
    try:
        return await while_running(qemu, wanted, doing)
    except EOFError:
        # A port is closed a moment before the process has ended.
        await qemu.wait()
        raise qemu.ended(doing) from None


async def _within(limit: float | None, work: Awaitable[T], what: str) -> T:
    try:
        return await asyncio.wait_for(work, limit)
    except TimeoutError:
        raise _TooLong(f"{what} within {limit:g} s") from None


class _Port:
    """A virtio-serial port: our end as a stream, and the end that QEMU is given."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, theirs: socket.socket
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.theirs = theirs

    def write(self, data: bytes) -> None:
        """Sends a little, which nobody may read."""
        if not self._writer.transport.get_write_buffer_size():
            self._writer.write(data)

    async def line(self) -> str:
        """The next line; EOFError when the port is closed."""
        line = (await self._reader.readline()).decode()
        if not line:
            raise EOFError
        return line

    async def copy(self, sink: Sink, mark: bytes) -> None:
        """Hand everything up to the mark to the sink, as it comes; EOFError without the mark."""
        kept = b""
        while data := await self._reader.read(1 << 16):
            kept += data
            if kept.endswith(mark):
                sink(kept[: -len(mark)])
                return
            # What may be the start of the mark waits for the rest.
            zero = kept.rfind(mark[:1], max(0, len(kept) - len(mark)))
            held = len(kept) if zero < 0 or not mark.startswith(kept[zero:]) else zero
            if held:
                sink(kept[:held])
            kept = kept[held:]
        raise EOFError


@contextlib.asynccontextmanager
async def _port() -> AsyncIterator[_Port]:
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            yield _Port(reader, writer, theirs)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _settings(machine: Outer, mark: bytes, shell: bool) -> str:
    kept = [path for path in machine.keep if str(path).startswith(tuple(_below(_OWN_PLACES)))]
    values = {
        "results": str(machine.results),
        "keep": " ".join(map(str, kept)),
        "release": machine.kernel.release,
        "modules": str(machine.kernel.root / "lib/modules" / machine.kernel.release),
        "shell": "yes" if shell else "",
        # Without its zero byte, which no shell variable can hold.
        "mark": mark[1:].decode(),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _below(places: tuple[str, ...]) -> list[str]:
    return [f"{place}/" for place in places]


def _command(
    machine: Outer,
    packed: Path,
    console: Path,
    fds: Mapping[str, int],
    monitor: int,
    terminal: int | None,
) -> list[str]:
    command = [
        *machine.emulator.command,
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-machine", "q35,usb=off,smbus=off,sata=off,hpet=off"),
        *("-accel", "tcg,thread=multi", "-cpu", "max,+svm"),
        *("-smp", f"{machine.cpus},maxcpus={max(machine.cpus, 2)}"),
        *("-m", str(machine.memory_mib)),
        *("-kernel", str(machine.kernel.image), "-initrd", str(packed)),
        # A panic ends QEMU (with -no-reboot) instead of leaving a lab that never answers.
        *("-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable"),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-device", "virtio-rng-pci"),
        *_share("root", Path("/"), "readonly=on,multidevs=remap"),
        *_share("results", machine.results, "multidevs=remap"),
        *("-device", "virtio-serial-pci,id=ports,max_ports=8"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
    ]
    for name, fd in fds.items():
        command += ["-chardev", f"socket,id={name},fd={fd}"]
        command += ["-device", f"virtserialport,bus=ports.0,chardev={name},name=lab.{name}"]
    if terminal is not None:
        command += ["-chardev", f"socket,id=terminal,fd={terminal}"]
        command += ["-device", "virtconsole,bus=ports.0,chardev=terminal"]
    return command


def _share(tag: str, path: Path, options: str) -> list[str]:
    fsdev = f"local,id={tag},path={path},security_model=none,{options}"
    return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
