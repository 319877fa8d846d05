"""How fuzzers are run: several at a time, the first failure named, none left behind."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzzing


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The script that each target runs, instead of the fuzzer."""
    scripts: dict[str, str] = {}
    monkeypatch.setattr(fuzzing, "FOUND", tmp_path / "found")
    monkeypatch.setattr(fuzzing, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(fuzzing, "command", lambda target: ["sh", "-c", scripts[target]])
    return scripts


def test_the_first_that_failed_is_the_first(
    programs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    os.mkfifo(first)
    os.mkfifo(second)
    programs["late"] = f"echo >{first}; read x <{second}; echo stat::number_of_executed_units: 7"
    programs["bad"] = f"read x <{first}; echo a bug; exit 1"
    programs["worse"] = f"echo >{second}; exit 1"
    assert fuzzing.fuzz(["late", "bad", "worse"], 1, 2, keep=False) == ["bad", "worse"]
    said = capsys.readouterr().out
    assert "fuzz: bad: no inputs\na bug\nfuzz: bad failed; again: " in said
    assert "fuzz: late: 7 inputs\n" in said


def test_none_is_left_behind(programs: dict[str, str], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    programs["endless"] = f"exec sleep infinity >{begun}"
    programs["never"] = f"touch {tmp_path}/served"
    running = fuzzing.Fuzzing()
    with ThreadPoolExecutor(1) as pool:
        runs = [pool.submit(running.run, name, 1, keep=False) for name in ("endless", "never")]
        with begun.open() as alive:
            running.end()
            assert alive.read() == ""  # the end of who had opened it
        for run in runs:
            with pytest.raises(fuzzing.Interrupted):
                run.result()
    assert not (tmp_path / "served").exists()
