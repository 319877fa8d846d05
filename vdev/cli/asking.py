"""Asking a server or a machine that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdev.errors import UserError
from vdev.runtime import runtime_dir
from vdev.server.control import find_machine, request


def path_of(server: str) -> Path:
    """The control socket of a server or machine: by process id, machine's name, or path."""
    if (machine := find_machine(server)) is not None:
        return machine
    return runtime_dir() / f"{server}.sock" if server.isdecimal() else Path(server)


def ask(path: Path, command: str, wait: float | None = 10, **arguments: Any) -> Any:
    """What it answers; wait: for so many seconds, None = as long as it takes. Raises UserError."""
    try:
        return request(path, command, patience=wait, **arguments)
    except OSError as error:
        raise UserError(
            f"{path}: no server answers there ({error.strerror or error}): see vdev status"
        ) from None
