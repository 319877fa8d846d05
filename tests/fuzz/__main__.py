"""``python -m tests.fuzz [--seconds N] [TARGET...]``: fuzz each target for so long.

As many run at a time as there are CPUs, each said in a line when it begins and when it ends; the
last line has the first that failed. An interrupt ends them all.

Starts from the inputs that are kept (``tests/fuzz/corpus/TARGET``); what it finds beyond them goes
into ``build/fuzz/TARGET`` and is used the next time. An input that fails is written there too, and
the command that runs it again is said. ``--keep`` puts the smallest set of inputs that reaches all
that was reached so far in the place of those that are kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.native.build import CLANG, ROOT, build_fuzz

KEPT = ROOT / "tests/fuzz/corpus"
FOUND = ROOT / "build/fuzz"
TARGETS = ("ring", "blk", "net", "switch", "inflight", "session", "control")
PYTHON = ("session", "control")
"""Those that are programs of Python's."""
_LARGEST = 6000
"""Bytes of an input: ring, tables and buffers of a small guest fit."""


def command(target: str) -> list[str]:
    """The program that fuzzes this target."""
    if target in PYTHON:
        return [sys.executable, "-m", f"tests.fuzz.{target}"]
    return [str(build_fuzz() / f"native/fuzz/fuzz_{target}")]


class Interrupted(Exception):
    """It was told to end before the target's time was over."""


class Fuzzing:
    """The fuzzers that run; each call may come from a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, target: str, seconds: int, *, keep: bool) -> bool:
        """Whether nothing was found that fails. Raises Interrupted."""
        found, kept = FOUND / target, KEPT / target
        for folder in (found, kept):
            folder.mkdir(parents=True, exist_ok=True)
        program = command(target)
        arguments = [
            *(f"-max_total_time={seconds}", f"-max_len={_LARGEST}", "-print_final_stats=1"),
            *("-verbosity=0", "-timeout=25", f"-artifact_prefix={found}/"),
        ]
        log = FOUND / f"{target}.log"
        code = self._run([*program, *arguments, str(found), str(kept)], log, target, seconds)
        said = log.read_text(errors="replace").splitlines()
        ran = [line.split()[-1] for line in said if line.startswith("stat::number_of_executed")]
        lines = [f"fuzz: {target}: {', '.join(ran) or 'no'} inputs"]
        if code:
            lines = [*lines, *said[-60:]]
            lines.append(f"fuzz: {target} failed; again: {' '.join(program)} {found}/crash-...")
        # In one piece: others print, too.
        print("\n".join(lines), flush=True)
        if keep and not code:
            _keep(program, found, kept)
        return not code

    def end(self) -> None:
        """Ends those that run, and lets no more begin."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()

    def _run(self, program: list[str], log: Path, target: str, seconds: int) -> int:
        with log.open("wb") as out:
            with self._lock:
                if self._ended:
                    raise Interrupted
                print(f"fuzz: {target} for {seconds} s", flush=True)
                # The terminal interrupts its group: they are ended here, not by themselves.
                process = subprocess.Popen(
                    program, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, process_group=0
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
            if self._ended:
                raise Interrupted
        return code


def fuzz(targets: Iterable[str], seconds: int, jobs: int, *, keep: bool) -> list[str]:
    """Those of the targets that failed, the first first."""
    fuzzing = Fuzzing()
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(fuzzing.run, target, seconds, keep=keep): target for target in targets}
        try:
            failed = [runs[run] for run in as_completed(runs) if not run.result()]
        finally:
            fuzzing.end()
    return failed


def _keep(program: list[str], found: Path, kept: Path) -> None:
    if kept.name in PYTHON:
        # To merge, the fuzzer starts itself again, which a Python program does not let it do.
        for path in found.iterdir():
            path.replace(kept / path.name)
        return
    smallest = FOUND / f"{kept.name}.smallest"
    shutil.rmtree(smallest, ignore_errors=True)
    smallest.mkdir()
    merge = [*program, "-merge=1", f"-max_len={_LARGEST}", "-verbosity=0"]
    subprocess.run(
        [*merge, *map(str, (smallest, kept, found))],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    shutil.rmtree(kept)
    shutil.move(smallest, kept)
    print(f"fuzz: {kept.name}: {sum(1 for _ in kept.iterdir())} inputs are kept")


def main() -> int:
    """0, 1 where a target failed, 2 where there is no fuzzer, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: CPUs)"
    )
    parser.add_argument("--keep", action="store_true", help="keep what was found")
    parser.add_argument("target", nargs="*", help=", ".join(TARGETS))
    options = parser.parse_args()
    if unknown := set(options.target) - set(TARGETS):
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}"
        )
    if not shutil.which(CLANG):
        print(f"fuzz: {CLANG} is missing: tests/lab/setup.sh fuzz installs it", file=sys.stderr)
        return 2
    targets = options.target or TARGETS
    build_fuzz()
    # Its default ends this process alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = fuzz(targets, options.seconds, options.jobs, keep=options.keep)
    except KeyboardInterrupt:
        print("fuzz: interrupted", file=sys.stderr)
        return 130
    if failed:
        print(f"fuzz: {len(failed)} of {len(targets)} failed, first {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
