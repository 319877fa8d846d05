"""Builds of libvhost alone, without Python, each kind in a directory of its own under build/."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "native"
HEADER = SOURCES / "include" / "libvhost.h"
PROGRAMS = sorted(path.stem for path in (SOURCES / "tests").glob("test_*.c"))

# What each kind of build is for, as meson options.
KINDS: Mapping[str, Sequence[str]] = {
    "plain": ["-Dbuildtype=release"],
    "address": ["-Dbuildtype=debugoptimized", "-Db_sanitize=address,undefined"],
    "thread": ["-Dbuildtype=debugoptimized", "-Db_sanitize=thread"],
}


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


def build(kind: str) -> Path:
    """Configures and compiles a kind of build with its tests; quick when repeated."""
    where = ROOT / "build" / "native" / kind
    again = ["--reconfigure"] if (where / "build.ninja").exists() else []
    run(
        *("meson", "setup", *again, str(where), str(ROOT), "-Dpython=false", "-Db_lundef=false"),
        *("--prefix", str(where / "prefix"), "--libdir", "lib", *KINDS[kind]),
    )
    run("meson", "compile", "-C", str(where))
    run("meson", "compile", "-C", str(where), "native-tests")
    return where
