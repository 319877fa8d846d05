"""The layers of vdev: imports go down only, and no module grows out of hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vdev"
MAX_LINES = 500

# From the bottom up.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("vdev._native",),
    (
        "vdev.errors",
        "vdev.units",
        "vdev.toml",
        "vdev.tables",
        "vdev.runtime",
        "vdev.closing",
        "vdev.record",
        "vdev.descriptors",
        "vdev.ratelog",
        "vdev.memory",
        "vdev.dirtylog",
        "vdev.inflight",
        "vdev.iothread",
        "vdev.metrics",
    ),
    ("vdev.registers",),
    ("vdev.config",),
    ("vdev.virtio.spec", "vdev.virtio.device", "vdev.virtio.queue", "vdev.virtio.batch"),
    ("vdev.virtio.transport",),
    ("vdev.blk", "vdev.net", "vdev.virtio.vhost_user", "vdev.virtio.pci", "vdev.virtio.mmio"),
    ("vdev.server", "vdev.vmm"),
    ("vdev.machines",),
    ("vdev.cli", "vdev.__main__"),
)
# Devices never import transports, nor the reverse, nor one device another; what serves devices to
# other VMMs and our own VMM know nothing of each other.
SEPARATE = (
    ("vdev.blk", "vdev.net", "vdev.virtio.vhost_user", "vdev.virtio.pci", "vdev.virtio.mmio"),
    ("vdev.server", "vdev.vmm"),
)
# These re-export what lies above them, when it is first asked for.
FACES = ("vdev", "vdev.blk", "vdev.net", "vdev.virtio")

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> tuple[int, str]:
    for level, members in enumerate(LAYERS):
        for member in members:
            if module == member or module.startswith(f"{member}."):
                return level, member
    raise AssertionError(f"{module} belongs to no layer: put it into LAYERS")


def imports_of(path: Path) -> Iterator[str]:
    """All modules of vdev that are imported, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vdev")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "vdev":
                yield from (f"vdev.{alias.name}" for alias in node.names)
            elif node.module is not None and node.module.startswith("vdev."):
                yield node.module


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    module = name_of(path)
    if module in FACES:
        return
    level, member = layer_of(module)
    for imported in imports_of(path):
        if imported in ("vdev", "vdev.__version__", "vdev.virtio"):
            continue
        below, other = layer_of(imported)
        assert below <= level, f"{module} imports {imported}, which is above it"
        beside = next((group for group in SEPARATE if member in group), ())
        if member != other:
            assert other not in beside, f"{module} imports {imported}, which stands beside it"


@pytest.mark.parametrize(
    "path",
    [
        *MODULES,
        *sorted((ROOT / "tests").rglob("*.py")),
        *sorted((ROOT / "perf").rglob("*.py")),
        *sorted((ROOT / "native").rglob("*.c")),
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_module_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, at most {MAX_LINES}: split it"
