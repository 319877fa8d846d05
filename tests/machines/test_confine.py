"""What a confined process imports later needs no extension module that it does not have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import vdev
from vdev.machines.confine import NEEDED

_HOME = Path(vdev.__file__).parent
_PARTS = ("blk", "machines", "server", "virtio", "vmm")
_NOT_CONFINED = {
    # A confined process is passed what these would open or make.
    "vdev.net.wiring",
    "vdev.machines.qemu",
    "vdev.vmm.virtiofs",
    "shutil",
    # A configuration file is read before.
    "tomllib",
}
_SCRIPT = """
import importlib, json, sys, vdev.cli.parsing

def extensions():
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    return {spec.name for spec in specs if spec and str(spec.origin).endswith(".so")}

at_start, needed, later = json.loads(sys.argv[1])
vdev.cli.parsing.import_asyncio_without_tls()
for name in at_start + needed:
    importlib.import_module(name)
before = extensions()
for name in later:
    importlib.import_module(name)
print(json.dumps(sorted(extensions() - before)))
"""


def _imported_later() -> Iterator[str]:
    """Modules that functions of ours import when they are called."""
    for part in _PARTS:
        for path in (_HOME / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.ImportFrom) and inner.module:
                            yield inner.module
                        elif isinstance(inner, ast.Import):
                            yield from (alias.name for alias in inner.names)


def test_all_extension_modules_are_there() -> None:
    at_start = ["vdev.cli.run", "vdev.machines.run", "vdev.vmm.machine"]
    later = sorted(set(_imported_later()) - _NOT_CONFINED)
    assert {"vdev.vmm.snapshot_writer", "vdev.virtio.vhost_user.remote"} <= set(later)

    def missing(needed: list[str]) -> list[str]:
        words = json.dumps([at_start, needed, later])
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, words], capture_output=True, text=True, check=True
        )
        names: list[str] = json.loads(done.stdout)
        return names

    assert missing(list(NEEDED)) == []
    # Each is one that would be missing.
    assert missing([]) == sorted(NEEDED)
