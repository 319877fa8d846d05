"""vdev as a user has it, also where it runs from a checkout.

A development install (meson-python, editable) puts a loader into the interpreter, which runs
the build system at each start. What is measured must be what is installed, so such a build is
installed beside a virtual environment of its own, which does not know the loader.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import vdev

WHERE = Path(__file__).resolve().parents[1] / "build" / "perf" / "installed"


def _editable_build() -> str | None:
    """The build directory behind an editable install of vdev, or None for a plain install."""
    for finder in sys.meta_path:
        tops = getattr(finder, "_top_level_modules", ())
        if vdev.__name__ in tops:
            return str(getattr(finder, "_build_path", "")) or None
    return None


@dataclass(frozen=True)
class Installed:
    """How to start vdev: the first words of the command, and the environment."""

    command: Sequence[str]
    environment: dict[str, str]


def _install(build: str) -> str:
    """Installs the build; returns the directory that holds the package."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mesonbuild.mesonmain", "install", "-C", build, "--quiet"),
            *("--no-rebuild", "--destdir", str(WHERE), "--tags", "runtime,python-runtime"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = sorted(WHERE.glob("**/vdev/__init__.py"))
    if done.returncode or not found:
        raise OSError(f"cannot install {build} into {WHERE}:\n{done.stdout}")
    return str(found[0].parents[1])


@cache
def find() -> Installed:
    """vdev as it is installed. Raises OSError if it cannot be."""
    build = _editable_build()
    if build is None:
        return Installed([str(Path(sys.executable).with_name("vdev"))], dict(os.environ))
    environment = WHERE / "venv"
    if not (environment / "bin" / "python").exists():
        venv.create(environment, symlinks=True)
    packages = os.pathsep.join((_install(build), sysconfig.get_path("platlib")))
    return Installed(
        [str(environment / "bin" / "python"), "-P", "-m", "vdev"],
        {**os.environ, "PYTHONPATH": packages},
    )
