"""``vdev upgrade``: servers are followed by other processes, while their guests go on."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from vdev.cli import EXIT_OK, EXIT_USER_ERROR
from vdev.cli.asking import ask, path_of
from vdev.errors import UserError
from vdev.server.control import find_servers


def upgrade(arguments: Namespace) -> int:
    """``vdev upgrade``."""
    program = _program(arguments.program)
    if not arguments.all:
        _upgrade(path_of(arguments.server), program, arguments.timeout)
        return EXIT_OK
    code = EXIT_OK
    # A machine's socket has the machine's name, and a dot, before the process id.
    for path in (path for path in find_servers() if path.stem.isdecimal()):
        try:
            _upgrade(path, program, arguments.timeout)
        except UserError as error:
            print(f"vdev: {path.stem}: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
    return code


def _upgrade(path: Path, program: str | None, timeout: float) -> None:
    answer = ask(path, "upgrade", wait=None, program=program, timeout=timeout)
    pause = answer["pause_ms"]
    print(f"{path.stem}: process {answer['pid']} serves, after a pause of {pause:.1f} ms")


def _program(path: str | None) -> str | None:
    """As the server finds it, whatever its folder is."""
    if path is None:
        return None
    found = shutil.which(path)
    if found is None:
        raise UserError(f"program {path}: no program is there: give the path of a vdev")
    return os.path.abspath(found)
