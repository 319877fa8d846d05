"""Servers that follow one another on an image, the last one perhaps with requests under way."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vdev.blk.image import Image, open_image
from vdev.errors import UserError

MODES = pytest.mark.parametrize(
    "options",
    [{"read_only": True}, {"lock": "running"}, {"lock": "running", "read_only": True}, {}],
    ids=["reader", "running", "running reader", "writer"],
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(65536))
    return str(file)


@MODES
def test_the_next_waits_until_the_last_has_ended(path: str, options: dict[str, Any]) -> None:
    """Who has the open file has its locks: here a descriptor, else a request in the kernel."""
    last = open_image(path, succession=5, **options)
    under_way = os.dup(last.fd)
    last.close()
    with pytest.raises(UserError, match="has still requests under way"):
        open_image(path, succession=5, **options)
    opened: list[Image] = []

    def open_next() -> None:
        opened.append(open_image(path, succession=5, patience=20, **options))

    waiting = threading.Thread(target=open_next)
    waiting.start()
    assert not opened
    os.close(under_way)
    waiting.join()
    opened[0].close()


def test_others_are_not_in_its_way(path: str) -> None:
    """Readers are many, and both ends of a migration have the image open."""
    readers = [open_image(path, read_only=True, succession=number) for number in (1, 2, 3)]
    for reader in readers:
        reader.close()
    here, there = (open_image(path, lock="running", succession=number) for number in (1, 2))
    here.take()
    with pytest.raises(UserError, match="in use"):
        there.take()
    here.give_back()
    there.take()
    # Its place in the succession is kept.
    with pytest.raises(UserError, match="under way"):
        open_image(path, lock="running", succession=1)
    here.close()
    there.close()
