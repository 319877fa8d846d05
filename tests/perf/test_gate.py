"""The gate: stored ratios and instruction counts against new ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perf import gate, host
from perf.errors import PerfError
from perf.gate import Baseline, Measured
from perf.instructions import Instructions, Toolchain
from tests.perf.rows import FAR, HOST, row, run

STEADY = [100.0] * 5
GCC = Toolchain("gcc 12", ("-O3",), ("glibc",), "x86_64")
COUNTED = Instructions(GCC, {"pop": 100.0}, {})
BEFORE = run(row({"vdev": [200.0] * 5, "peer": STEADY}))
BASELINE = gate.update(Baseline(), BEFORE, COUNTED)


def test_the_same_again_passes() -> None:
    changes, left = gate.changes(BASELINE, BEFORE)
    assert [change.ratio.value for change in changes] == [1.0]
    assert left == []
    assert gate.instruction_changes(BASELINE, COUNTED) == ([], [])


def test_a_regression_shows() -> None:
    changes, _ = gate.changes(BASELINE, run(row({"vdev": [150.0] * 5, "peer": STEADY})))
    (change,) = changes
    assert change.worsening == pytest.approx(0.25)
    assert change.is_worse(gate.RATIO_THRESHOLD)


def test_what_has_no_baseline_is_named_and_not_passed_over() -> None:
    far = run(row({"vdev": STEADY, "peer": STEADY}, placement=FAR))
    changes, left = gate.changes(BASELINE, far)
    assert changes == []
    assert left == ["row, iops, vdev / peer: no baseline for far"]


def test_a_baseline_grows_by_what_is_new_and_keeps_the_rest() -> None:
    far = run(row({"vdev": [300.0] * 5, "peer": STEADY}, placement=FAR))
    (both,) = gate.update(BASELINE, far, COUNTED).hosts
    assert {stored.placement: stored.ratio for stored in both.ratios} == {"near": 2.0, "far": 3.0}


def test_another_kind_of_host_is_named_and_has_ratios_of_its_own() -> None:
    slow = replace(HOST, kernel="6.1.0", system_call_ns=1200.0)
    there = run(row({"vdev": [150.0] * 5, "peer": STEADY}), host=slow)
    changes, left = gate.changes(BASELINE, there)
    assert changes == []
    (told,) = left
    assert "kernel 6.1.0, not 6.18.44-one" in told
    assert "a system call 1200 ns, not 180 ns" in told
    assert "a read of 4 KiB" not in told
    both = gate.update(BASELINE, there, COUNTED)
    assert [change.ratio.value for change in gate.changes(both, there)[0]] == [1.0]
    assert [change.ratio.value for change in gate.changes(both, BEFORE)[0]] == [1.0]


def test_a_host_in_another_mood_is_the_same_host() -> None:
    mood = replace(HOST, kernel="6.18.50", system_call_ns=340.0)
    changes, left = gate.changes(
        BASELINE, run(row({"vdev": [200.0] * 5, "peer": STEADY}), host=mood)
    )
    assert len(changes) == 1
    assert left == []


def test_of_several_hosts_of_a_kind_the_most_alike_counts() -> None:
    near, off = (replace(HOST, system_call_ns=ns) for ns in (150.0, 250.0))
    both = Baseline([Measured(near), Measured(off)])
    for ns, expected in ((160.0, near), (240.0, off)):
        found = both.measured_on(replace(HOST, system_call_ns=ns))
        assert found
        assert found.host == expected


def test_a_peer_of_another_version_is_named_and_replaced() -> None:
    later = run(row({"vdev": STEADY, "peer": STEADY}))
    later.suites[0].rows[0].servers[1].version = "2.0"
    changes, left = gate.changes(BASELINE, later)
    assert changes == []
    assert left == ["row, iops, vdev / peer: baseline with 1.0, not 2.0"]
    (measured,) = gate.update(BASELINE, later, COUNTED).hosts
    assert measured.peers == {"peer": "2.0"}
    assert [stored.ratio for stored in measured.ratios] == [1.0]


def test_this_host_is_of_its_own_kind() -> None:
    first, second = host.measure(), host.measure()
    assert first.cpu == second.cpu
    assert first.kernel == second.kernel
    assert 0 < first.system_call_ns < first.read_ns


def test_busy_rows_are_not_stored() -> None:
    busy = row({"vdev": STEADY, "peer": STEADY}, wanted=6)
    assert not busy.calm
    assert gate.update(Baseline(), run(busy), COUNTED).hosts == []
    assert gate.update(BASELINE, run(busy), COUNTED) == BASELINE


def test_more_instructions_are_a_regression_and_fewer_are_not() -> None:
    more = replace(COUNTED, per_request={"pop": 101.5})
    worse, _ = gate.instruction_changes(BASELINE, more)
    assert worse == ["pop: 101.5 instructions a request, baseline 100.0"]
    fewer = replace(COUNTED, per_request={"pop": 50.0})
    assert gate.instruction_changes(BASELINE, fewer) == ([], [])


def test_counts_of_another_compiler_are_named_and_not_compared() -> None:
    other = Instructions(replace(GCC, compiler="clang 19"), {"pop": 500.0}, {})
    worse, left = gate.instruction_changes(BASELINE, other)
    assert worse == []
    assert "clang 19" in left[0]


def test_a_scenario_without_baseline_is_named() -> None:
    more = replace(COUNTED, per_request={"pop": 100.0, "push": 1.0})
    assert gate.instruction_changes(BASELINE, more) == ([], ["instructions of push: no baseline"])


def test_a_baseline_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    gate.write(BASELINE, path)
    assert gate.read(path) == BASELINE
    path.write_text("{nonsense")
    with pytest.raises(PerfError, match=r"baseline\.json is no baseline"):
        gate.read(path)
    with pytest.raises(PerfError, match="gate --update"):
        gate.read(tmp_path / "gone.json")


def test_the_short_set_has_a_base_and_a_peer_for_each_workload() -> None:
    plan = gate.plan()
    assert {suite.name for suite, _ in plan} >= {"blk", "net", "start"}
    for _, workloads in plan:
        for workload in workloads:
            assert len(workload.servers) == gate.SERVERS, workload.name


def test_the_baseline_of_the_project_knows_the_short_set() -> None:
    stored = gate.read(gate.BASELINE)
    wanted = {workload.name for _, workloads in gate.plan() for workload in workloads}
    assert stored.hosts
    for measured in stored.hosts:
        assert {ratio.workload for ratio in measured.ratios} == wanted
        assert {ratio.peer for ratio in measured.ratios} == set(measured.peers)
    assert stored.toolchain
    assert stored.instructions
