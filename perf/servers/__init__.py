"""The servers under test, a file each; every module's ``SERVERS`` are known by their names.

A server of one's own is a file with a ``SERVERS`` list, given by ``--plugin FILE``. A known server
whose program lies elsewhere (last week's build, say) is given by ``--server NAME=KNOWN:COMMAND``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from perf.errors import PerfError
from perf.model import Server

_known: dict[str, Server] = {}


class UnknownServer(PerfError):
    """No server of this name, or a file that defines none; the message lists what there is."""


def _add(module: ModuleType) -> None:
    for server in module.SERVERS:
        _known[server.name] = server


def _all() -> dict[str, Server]:
    if not _known:
        for found in pkgutil.iter_modules(__path__):
            _add(importlib.import_module(f"{__name__}.{found.name}"))
    return _known


def names() -> Iterable[str]:
    """The names of all known servers."""
    return _all().keys()


def find(name: str) -> Server:
    """The server of this name. Raises UnknownServer."""
    known = _all()
    if name not in known:
        raise UnknownServer(f"there is no server {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def add_plugin(path: Path) -> None:
    """Adds the servers of a file. Raises UnknownServer when it has none."""
    _all()
    specification = importlib.util.spec_from_file_location(f"perf_plugin_{path.stem}", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise UnknownServer(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not hasattr(module, "SERVERS"):
        raise UnknownServer(f"{path} has no list SERVERS")
    _add(module)


def add_variant(text: str) -> str:
    """Adds NAME=KNOWN:COMMAND, a known server run by another command; returns NAME.

    Raises UnknownServer when the text is of another form or the server takes no command.
    """
    name, _, rest = text.partition("=")
    known, _, command = rest.partition(":")
    if not name or not command:
        raise UnknownServer(f"{text!r} is not of the form NAME=KNOWN:COMMAND")
    _known[name] = find(known).with_command(name, shlex.split(command))
    return name
