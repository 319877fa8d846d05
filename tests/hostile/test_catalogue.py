"""docs/robustness.md names a test for each item of the catalogue, and the tests are there."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ITEMS = range(1, 68)
_ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
_REFERENCE = re.compile(r"`([\w/.]+)::(\w*)`")
_NUMBERED = re.compile(r"(?:def test_|_|[\"'])(?:cp|r|b)(\d\d)(?=[_-])")


@cache
def table() -> dict[int, list[tuple[Path, str]]]:
    """item → its tests: the file, and how their names begin."""
    rows: dict[int, list[tuple[Path, str]]] = {}
    for number, _, _, cell in _ROW.findall((ROOT / "docs/robustness.md").read_text()):
        assert int(number) not in rows, f"two rows for item {number}"
        rows[int(number)] = [(path_of(name), test) for name, test in _REFERENCE.findall(cell)]
    return rows


def path_of(name: str) -> Path:
    return ROOT / name if name.startswith("native/") else ROOT / "tests" / name


def test_every_item_has_a_row() -> None:
    assert list(table()) == list(ITEMS)


@pytest.mark.parametrize("item", ITEMS)
def test_the_tests_of_an_item_exist(item: int) -> None:
    assert table()[item], "no test is named"
    for path, name in table()[item]:
        text = path.read_text()
        if path.suffix == ".c":
            found = re.search(rf"\bTEST\({name}", text)
        elif name.startswith("test_"):
            found = re.search(rf"\bdef {name}\(", text)
        else:
            assert int(name.lstrip("cpbr")) == item
            found = re.search(rf"def test_(?:\w+_)?{name}_|[\"']{name}-", text)
        assert found, f"{path}: no test {name}"


def test_no_numbered_test_is_missing() -> None:
    numbered: dict[int, set[Path]] = defaultdict(set)
    for folder in ("hostile", "blk"):
        for path in (ROOT / "tests" / folder).glob("test_*.py"):
            for number in _NUMBERED.findall(path.read_text()):
                numbered[int(number)].add(path)
    assert len(numbered) > 50
    for item, paths in numbered.items():
        # What was not agreed on is tested with each message (24, beside the item itself).
        named = {path for path, _ in table()[item]}
        assert paths <= named | {ROOT / "tests/hostile/test_device_state.py"}, item
