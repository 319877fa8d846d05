"""The journal of what to undo, without touching any network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vdev.errors import UserError
from vdev.net.state import Journal

RECORD = {"undo": "delete bridge", "name": "br0", "index": 7}
OTHER = {"undo": "unplug", "name": "tap0", "index": 8}


def leftovers(directory: Path) -> list[list[dict[str, object]]]:
    return [list(journal.records) for journal in Journal.leftovers(directory)]


def write_by_dead_process(directory: Path, *records: dict[str, object]) -> Path:
    """A journal as a process leaves it that was killed."""
    code = (
        "import json, os, signal, sys; from pathlib import Path\n"
        "from vdev.net.state import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for record in json.loads(sys.argv[2]): journal.add(record)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    argv = [sys.executable, "-c", code, os.fspath(directory), json.dumps(records)]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    (path,) = directory.glob("net-*.json")
    return path


def test_no_file_without_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal.close()
    assert not (tmp_path / "run").exists()


def test_the_file_goes_with_the_last_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(RECORD)
    journal.add(OTHER)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["records"] == [RECORD, OTHER]
    assert path.stat().st_mode & 0o777 == 0o600
    journal.strike(OTHER)
    assert json.loads(path.read_text())["records"] == [RECORD]
    journal.strike(RECORD)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_keeps_its_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(RECORD)
    assert leftovers(tmp_path) == []
    journal.close()
    assert leftovers(tmp_path) == [[RECORD]]


def test_a_dead_process_leaves_its_records(tmp_path: Path) -> None:
    path = write_by_dead_process(tmp_path, RECORD, OTHER)
    assert leftovers(tmp_path) == [[RECORD, OTHER]]
    assert path.exists()
    for journal in Journal.leftovers(tmp_path):
        journal.strike(OTHER)
    assert leftovers(tmp_path) == [[RECORD]]
    for journal in Journal.leftovers(tmp_path):
        journal.strike(RECORD)
    assert not path.exists()


@pytest.mark.parametrize(
    "content", ["", "{", '{"boot": "another", "netns": [0, 0], "records": []}']
)
def test_a_void_journal_is_removed(tmp_path: Path, content: str) -> None:
    """Killed before the first record was written, or of a boot before this one."""
    path = tmp_path / "net-1-0.json"
    path.write_text(content)
    assert leftovers(tmp_path) == [[]]
    assert not path.exists()


def test_a_shorter_journal_over_a_longer_one_can_be_read(tmp_path: Path) -> None:
    """Killed between the write and the truncation."""
    path = write_by_dead_process(tmp_path, RECORD)
    path.write_text(path.read_text() + "rest of a longer one]}")
    assert leftovers(tmp_path) == [[RECORD]]


def test_another_namespace_is_left_alone(tmp_path: Path) -> None:
    path = write_by_dead_process(tmp_path, RECORD)
    content = json.loads(path.read_text())
    content["netns"][1] += 1
    path.write_text(json.dumps(content))
    assert leftovers(tmp_path) == []
    assert path.exists()


def test_a_directory_that_cannot_be_had(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="file"):
        Journal(file).add(RECORD)
