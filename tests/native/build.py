"""Builds of libvhost alone, without Python, each kind in a directory of its own under build/."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "native"
HEADERS = sorted((SOURCES / "include").glob("*.h"))
PROGRAMS = sorted(path.stem for path in (SOURCES / "tests").glob("test_*.c"))

# What each kind of build is for, as meson options.
KINDS: Mapping[str, Sequence[str]] = {
    "plain": ["-Dbuildtype=release"],
    "address": ["-Dbuildtype=debugoptimized", "-Db_sanitize=address,undefined"],
    "thread": ["-Dbuildtype=debugoptimized", "-Db_sanitize=thread"],
}
# For programs of these builds: whatever a sanitizer finds ends them, and freed memory is no zeroes.
ENVIRONMENT = {
    "ASAN_OPTIONS": "halt_on_error=1:abort_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
    "MALLOC_PERTURB_": "165",
}
# Needs clang; the fuzzer's libraries are linked to its targets alone.
FUZZ = [
    *KINDS["address"],
    *("-Dfuzz=true", "-Dc_args=-fsanitize=fuzzer-no-link -fno-sanitize-recover=all"),
    *("-Dwerror=false",),
]
CLANG = "clang-14"


def run(*command: str, env: Mapping[str, str] | None = None) -> str:
    """Runs a command of the build; returns its output, or fails with all of it."""
    scripts = os.path.dirname(sys.executable)
    path = {"PATH": scripts + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        command,
        env={**os.environ, **path, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@cache
def build(kind: str) -> Path:
    """Configures a kind of build, and compiles its tests; "address" replays kept inputs, too."""
    where = _configure(kind, KINDS[kind])
    fuzz = ["fuzz"] if kind == "address" else []
    run("meson", "compile", "-C", str(where), "native-tests", *fuzz)
    return where


@cache
def build_fuzz() -> Path:
    """The fuzz targets with the fuzzer in them. Needs clang."""
    where = _configure("fuzz", FUZZ, env={"CC": CLANG})
    run("meson", "compile", "-C", str(where), "fuzz")
    return where


def _configure(kind: str, options: Sequence[str], env: Mapping[str, str] | None = None) -> Path:
    where = ROOT / "build" / "native" / kind
    again = ["--reconfigure"] if (where / "build.ninja").exists() else []
    run(
        *("meson", "setup", *again, str(where), str(ROOT), "-Dpython=false", "-Db_lundef=false"),
        *("--prefix", str(where / "prefix"), "--libdir", "lib", *options),
        env=env,
    )
    return where
