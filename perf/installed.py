"""vdev as a user has it, also where it runs from a checkout.

A development install (meson-python, editable) runs the build system each time it starts. What
starts must be what is installed, so such a build is installed into a directory of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


@cache
def environment() -> dict[str, str]:
    """The environment in which vdev starts as an installed one. Raises OSError if it cannot."""
    build = _editable_build()
    if build is None:
        return dict(os.environ)
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
    packages = str(found[0].parents[1])
    path = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "MESONPY_EDITABLE_SKIP": build, "PYTHONPATH": path}
