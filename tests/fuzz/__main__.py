"""``python -m tests.fuzz [--seconds N] [TARGET...]``: fuzz each target for so long.

Starts from the inputs that are kept (``tests/fuzz/corpus/TARGET``); what it finds beyond them goes
into ``build/fuzz/TARGET`` and is used the next time. An input that fails is written there too, and
the command that runs it again is said. ``--keep`` puts the smallest set of inputs that reaches all
that was reached so far in the place of those that are kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


def fuzz(target: str, seconds: int, *, keep: bool) -> bool:
    """Whether nothing was found that fails."""
    found, kept = FOUND / target, KEPT / target
    for folder in (found, kept):
        folder.mkdir(parents=True, exist_ok=True)
    program = command(target)
    print(f"fuzz: {target} for {seconds} s", flush=True)
    arguments = [
        *(f"-max_total_time={seconds}", f"-max_len={_LARGEST}", "-print_final_stats=1"),
        *("-verbosity=0", "-timeout=25", f"-artifact_prefix={found}/"),
    ]
    log = FOUND / f"{target}.log"
    with log.open("wb") as out:
        done = subprocess.run(
            [*program, *arguments, str(found), str(kept)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = log.read_text(errors="replace").splitlines()
    ran = [line.split()[-1] for line in said if line.startswith("stat::number_of_executed")]
    print(f"fuzz: {target}: {', '.join(ran) or 'no'} inputs", flush=True)
    if done.returncode:
        print("\n".join(said[-60:]))
        print(f"fuzz: {target} failed; again: {' '.join(program)} {found}/crash-...")
        return False
    if keep:
        _keep(program, found, kept)
    return True


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
    """0, 1 where a target failed, 2 where there is no fuzzer."""
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
    with ThreadPoolExecutor(options.jobs) as pool:
        passed = list(pool.map(partial(fuzz, seconds=options.seconds, keep=options.keep), targets))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
