"""What the documents tell a reader to write works, and the files they name exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from vdev.config import load_config
from vdev.server.switch_config import SwitchConfig
from vdev.tables import decode

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_configuration_example(tmp_path: Path) -> None:
    (example,) = blocks("toml")
    (tmp_path / "vm1.toml").write_text(example)
    config = load_config(str(tmp_path / "vm1.toml"))
    assert len(config.blk) == 2
    assert len(config.net) == 1


@pytest.mark.parametrize("number", range(2), ids=["servers", "machine"])
def test_the_python_examples(number: int) -> None:
    example = blocks("python")[number]
    compile(example, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert len([line for line in example.splitlines() if line]) <= 12


def test_the_switch_example() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/switch.md").read_text(), re.DOTALL)
    config = decode(SwitchConfig, {"name": "lan0", **tomllib.loads(example)}, "")
    assert config.guests.private
    assert [port.name for port in config.ports] == ["up"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:native|vdev|tests)/[\w/]+\.(?:py|c|h))`", document.read_text())
    for name in named:
        assert (ROOT / name).exists(), name


def test_functions_that_are_named_exist() -> None:
    """The C functions on the two paths of docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "native/src").glob("*.c"))
    for name in re.findall(r"`((?:ring|queue|blk|net|iothread|vhost)_\w+)`", text):
        assert re.search(rf"\b{name}\(", sources), name
