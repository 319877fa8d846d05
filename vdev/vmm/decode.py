"""The file that describes a machine."""

from __future__ import annotations

from pathlib import Path

from vdev.tables import decode
from vdev.toml import read_toml
from vdev.vmm.config import MachineConfig


def load_machine(path: str, **changes: str) -> MachineConfig:
    """The machine that the TOML file `path` describes; paths in it start at its folder.

    Without a name it has the file's; `changes` stand above what the file says. Raises UserError
    with a line for each mistake, which names file, table, key, value and what would be right.
    """
    tables = {"name": Path(path).stem, **read_toml(path), **changes}
    return decode(MachineConfig, tables, f"{path}: ", Path(path).resolve().parent)
