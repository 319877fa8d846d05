"""Run a command where /dev/kvm works: ``python -m tests.lab.kvm -- COMMAND...`` or ``--shell``.

Where this host's KVM runs stock kernels the command runs on the host. Everywhere else it runs in
the KVM lab (``outer.py``) with the same working tree, directory, tools and paths. Its output comes
as it is written, its exit code becomes ours, and what it writes below ``--results`` (told to it as
``VDEV_LAB_RESULTS``) stays. Exit code 125 means that the lab itself failed, 124 that one of its
CPUs stood still, as emulated SVM has it now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
import sysconfig
import tempfile
import termios
import tty
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cache, emulator, host, innermost, kernel, rootfs
from .outer import LabError, LabStandsStill, Outer, Streams
from .outer import run as run_outer
from .process import ProcessError

RESULTS = "VDEV_LAB_RESULTS"
EVENTS = "VDEV_LAB_EVENTS"
"""Where a command may write lines that go to ``--events-fd`` (tests/lab/inner_tests.py does)."""
LAB_FAILED = 125
LAB_STANDS_STILL = 124
_TOP = Path(__file__).parents[2]
# Of the environment a command in there gets these, and what --env adds.
_PASSED = ("CI", "HOME", "LANG", "LC_ALL", "PATH", "PYTEST_ADDOPTS", "TERM", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Job:
    """A command to run where KVM works."""

    command: Sequence[str]
    directory: Path
    results: Path
    environment: Mapping[str, str]


async def run_in_lab(job: Job, streams: Streams, *, limit: float | None = None) -> int:
    """Run the job in the KVM lab and return its exit code; its console is in the results.

    ``limit``: the most seconds that the job may take. Raises LabError.
    """
    try:
        material = await innermost.prepare()
        own_kernel = await kernel.fetch()
        own_emulator = await emulator.fetch()
        # Found by its name in there, where it cannot be made.
        await rootfs.build()
    except ProcessError as error:
        raise LabError(str(error)) from None
    if own_emulator.version is None:
        print(
            f"kvm lab: QEMU {emulator.WANTED} cannot be had, the installed one runs it",
            file=sys.stderr,
            flush=True,
        )
    note = job.results / "material.json"
    innermost.write(material, note)
    environment = {
        **{name: os.environ[name] for name in _PASSED if name in os.environ},
        RESULTS: str(job.results),
        EVENTS: "/dev/virtio-ports/lab.events",
        innermost.VARIABLE: str(note),
        **job.environment,
    }
    machine = Outer(
        emulator=own_emulator,
        kernel=own_kernel,
        job=_script(job, environment),
        results=job.results,
        keep=_needed(job),
        console=job.results / "console.log",
    )
    return await run_outer(machine, streams, limit)


def _needed(job: Job) -> tuple[Path, ...]:
    prefixes = (Path(sys.prefix), Path(sys.base_prefix))
    wanted = {_TOP, cache.directory(), job.directory, *prefixes}
    # A directory below another one of these comes with it.
    return tuple(path for path in sorted(wanted) if not wanted & set(path.parents))


def _script(job: Job, environment: Mapping[str, str]) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join(
        [*_as_built(), *exports, f"cd {shlex.quote(str(job.directory))}", shlex.join(job.command)]
    )


def _as_built() -> Iterator[str]:
    """Turn the editable install, which looks for work on every import, into a plain path.

    It is built by now: importing it here has seen to that. Only the lab's own view changes.
    """
    import vdev._native

    built = Path(vdev._native.__file__)
    pth = Path(sysconfig.get_path("purelib")) / "vdev-editable.pth"
    if pth.exists() and _TOP / "vdev" not in built.parents:
        yield f"echo {shlex.quote(str(_TOP))} >{shlex.quote(str(pth))}"
        yield f"ln -sf {shlex.quote(str(built))} {shlex.quote(str(_TOP / 'vdev'))}/"


async def run_here(job: Job, events: int | None) -> int:
    """Run the job on this host, with our own output, and return its exit code."""
    environment = {**os.environ, RESULTS: str(job.results), **job.environment}
    if events is not None:
        environment[EVENTS] = f"/dev/fd/{events}"
    process = await asyncio.create_subprocess_exec(
        *job.command,
        cwd=job.directory,
        env=environment,
        pass_fds=() if events is None else (events,),
    )
    try:
        code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return code if code >= 0 else 128 - code


@contextlib.asynccontextmanager
async def _terminal() -> AsyncIterator[socket.socket]:
    """Our terminal as a socket for QEMU: raw for that long, and what it was afterwards."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    before = termios.tcgetattr(0)
    tty.setraw(0)
    loop.add_reader(0, lambda: ours.sendall(os.read(0, 4096)))
    loop.add_reader(ours, lambda: _write(1, ours.recv(1 << 16)))
    try:
        yield theirs
    finally:
        loop.remove_reader(0)
        loop.remove_reader(ours)
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        theirs.close()
        ours.close()


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def _shell(job: Job, limit: float | None) -> int:
    columns, rows = os.get_terminal_size(0)
    # What a login sets up on the host may take half a minute in there.
    size = f"stty rows {rows} cols {columns}; exec bash --norc"
    job = Job(("sh", "-c", size), job.directory, job.results, job.environment)
    async with _terminal() as terminal:
        streams = Streams(lambda data: None, lambda data: None, terminal=terminal)
        return await run_in_lab(job, streams, limit=limit)


async def _main(options: argparse.Namespace, results: Path) -> int:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    environment = dict(word.split("=", 1) for word in options.env)
    command = options.command or ["bash"]
    job = Job(command, Path.cwd(), results, environment)
    kvm = host.usable_kvm()
    if kvm.usable and not options.emulate:
        return await run_here(job, options.events_fd)
    print(f"kvm lab: {kvm.reason}; this runs in the lab", file=sys.stderr, flush=True)
    if options.shell:
        return await _shell(job, options.limit)
    events = options.events_fd
    streams = Streams(
        out=lambda data: _write(1, data),
        err=lambda data: _write(2, data),
        events=lambda data: None if events is None else _write(events, data),
    )
    return await run_in_lab(job, streams, limit=options.limit)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.kvm", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="a shell on this terminal")
    parser.add_argument("--results", type=Path, metavar="DIR", help="kept; default: thrown away")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end it after so long")
    parser.add_argument("--emulate", action="store_true", help="even where the host has KVM")
    parser.add_argument("--events-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    options = parser.parse_args(arguments)
    if options.shell == bool(options.command):
        parser.error("give either --shell or a command after --")
    for word in options.env:
        if "=" not in word:
            parser.error(f"--env {word}: not NAME=VALUE")
    if options.shell and not os.isatty(0):
        parser.error("--shell needs a terminal")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit code, or 125 where the lab failed, 130 where it was interrupted."""
    options = _options(arguments)
    with contextlib.ExitStack() as stack:
        if options.results:
            options.results.mkdir(parents=True, exist_ok=True)
            results = options.results.resolve()
        else:
            made = tempfile.TemporaryDirectory(prefix="vdev-kvm-results-")
            results = Path(stack.enter_context(made))
        try:
            return asyncio.run(_main(options, results))
        except LabStandsStill as error:
            print(f"kvm lab: {error}", file=sys.stderr)
            return LAB_STANDS_STILL
        except LabError as error:
            print(f"kvm lab: {error}", file=sys.stderr)
            return LAB_FAILED
        except asyncio.CancelledError:
            print("kvm lab: interrupted", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
