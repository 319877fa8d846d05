"""Which rounds count, what follows from them, and results as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import results
from perf.results import DIED, Failure, Row
from tests.perf.rows import FAR, MIXED, row, run, server, window


def made(wanted: int, **windows: list[results.Window]) -> Row:
    found = row({"a": []}, wanted=wanted)
    found.servers = [server(name, seen) for name, seen in windows.items()]
    return found


def test_the_base_is_compared_with_the_best_peer() -> None:
    found = row({"ours": [300.0] * 3, "slow": [100.0] * 3, "fast": [200.0] * 3})
    assert found.base
    best = found.best_peer("iops")
    assert best
    assert best.name == "fast"
    ratio = found.ratio(found.base, best, "iops")
    assert ratio
    assert ratio.value == 1.5


def test_the_best_is_the_lowest_where_low_is_good() -> None:
    found = row({"ours": [1.0], "slow": [9.0], "quick": [2.0]}, metric="latency_p50_us")
    best = found.best_peer("latency_p50_us")
    assert best
    assert best.name == "quick"


def test_only_rounds_of_one_distance_count() -> None:
    found = made(
        2,
        ours=[
            window(0, iops=200),
            window(1, iops=50, placement=FAR),
            window(2, iops=1, placement=MIXED),
            window(3, iops=1),
            window(4, iops=200),
        ],
        peer=[
            window(0, iops=100),
            window(1, iops=50, placement=FAR),
            window(2, iops=900),
            window(3, iops=900, placement=FAR),
            window(4, iops=100),
        ],
    )
    assert found.placement == "near"
    assert found.counting == {0, 4}
    assert found.rounds == 5


def test_disturbed_rounds_count_only_where_there_are_too_few_others() -> None:
    calm = [window(0, iops=2.0)]
    busy = [window(1, iops=9.0, others=0.5)]
    found = made(1, ours=calm + busy)
    assert found.calm
    assert found.counting == {0}
    few = made(2, ours=calm + busy)
    assert not few.calm
    assert few.counting == {0, 1}


def test_a_second_instance_disturbed_or_moved_spoils_the_round_too() -> None:
    found = row({"ours": [1.0, 1.0], "peer": [1.0, 1.0]}, again=[1.0, 1.0])
    assert found.again
    found.again.windows[0] = window(0, iops=1.0, placement=FAR)
    assert found.counting == {1}


def test_cores_that_never_kept_their_distance_leave_nothing() -> None:
    found = made(1, ours=[window(0, iops=1.0, placement=MIXED)])
    assert found.counting == set()
    assert found.placement == MIXED
    assert found.estimate(found.servers[0], "iops") is None


def test_a_server_that_left_early_is_compared_over_the_rounds_that_it_had() -> None:
    found = row({"ours": [2.0, 4.0, 6.0], "peer": [1.0]})
    assert found.base
    ratio = found.ratio(found.base, found.peers[0], "iops")
    assert ratio
    assert (ratio.value, ratio.count) == (2.0, 1)


def test_noise_is_what_two_instances_of_the_base_differ_by() -> None:
    found = row({"ours": [100.0, 200.0]}, again=[110.0, 220.0])
    noise = found.noise("iops")
    assert noise
    assert noise.value == pytest.approx(1.1)
    assert row({"ours": [1.0]}).noise("iops") is None


def test_a_base_without_windows_is_none() -> None:
    found = made(1, ours=[], peer=[window(0, iops=1.0)])
    assert found.base is None
    assert [peer.name for peer in found.peers] == ["peer"]


def test_a_run_comes_back_from_its_file(tmp_path: Path) -> None:
    first = row({"ours": [1.0, 2.0], "peer": [3.0, 4.0]}, again=[1.0, 2.0])
    first.servers[0].latency = {1000: 5}
    first.failures.append(Failure("peer", DIED, "was ended by SIGKILL", ["last", "words"]))
    first.absent["spdk"] = "not here"
    whole = run(first)
    path = tmp_path / "deep" / "run.json"
    results.write(whole, path)
    assert results.read(path) == whole
    assert whole.failures == [(first, first.failures[0])]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"schema_version": "x"}', b"\xff\xfe"], ids=repr
)
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(results.ResultsError, match=r"bad\.json is no results file"):
        results.read(path)


def test_a_missing_file_and_one_of_another_version_are_named(tmp_path: Path) -> None:
    with pytest.raises(results.ResultsError, match=r"gone\.json"):
        results.read(tmp_path / "gone.json")
    later = run()
    later.schema_version = 99
    results.write(later, tmp_path / "later.json")
    with pytest.raises(results.ResultsError, match="version 99"):
        results.read(tmp_path / "later.json")
