"""Instruction counts: exactly repeatable, sensitive to what costs more, refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.instructions import UnknownScenario, main, measure, parse
from perf.tools import ToolMissing


def test_a_count_repeats_to_the_instruction() -> None:
    scenarios = ["blk-null-write-1", "net-rx-32"]
    first, second = measure(scenarios), measure(scenarios)
    assert first == second
    assert list(first.per_request) == scenarios
    assert first.toolchain.compiler
    assert "-O3" in first.toolchain.flags


def test_what_costs_more_counts_more() -> None:
    told: list[str] = []
    scenarios = ["ring-direct-32", "ring-indirect-32", "ring-indirect-1", "blk-null-write-32"]
    counted = measure(scenarios, told.append)
    direct, indirect, alone, request = counted.per_request.values()
    # A table to find behind the descriptor; a call for each request; a block device around it.
    assert direct < indirect < alone
    assert indirect < request
    assert told[-4:] == scenarios


def test_the_functions_make_up_the_count() -> None:
    counted = measure(["net-tx-1"])
    functions = counted.functions["net-tx-1"]
    assert sum(functions.values()) == pytest.approx(counted.per_request["net-tx-1"])
    assert {"split_pop", "split_push", "split_publish", "net_tx_service"} <= functions.keys()
    # The guest's turn is no part of it.
    assert "uncounted" not in functions
    assert list(functions.values()) == sorted(functions.values(), reverse=True)


def test_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownScenario, match="no scenario quantum: there are ring-direct-1,"):
        measure(["ring-direct-1", "quantum"])
    assert main(["quantum"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("perf: no scenario quantum")


def test_missing_valgrind_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="apt install valgrind"):
        measure()
    assert main([]) == 2
    assert "apt install valgrind" in capsys.readouterr().err


PROFILE = """\
events: Ir
fl=ring_split.c
fn=ring_pop
10 5
11 2
cfn=memory_find
calls=3 0
11 30
12 1

fn=memory_find
5 30
totals: 38
"""


def test_a_call_is_not_counted_twice() -> None:
    counts, total = parse(PROFILE.splitlines())
    assert counts == {"ring_pop": 8, "memory_find": 30}
    assert total == 38
