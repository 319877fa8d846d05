"""The load generator and what is built on it: a real server keeps every byte of a heavy load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import servers
from perf.frontend import Frontend, Load, Outcome
from perf.measure import Measured, Row, Window, cpu_us, iops
from perf.noise import FAR_NS, Distance
from perf.servers import VDEV, Image, Kind, Server, ToolMissing
from vdev._native import lib

SIZE = 8 << 20
RINGS = {
    "plain": 0,
    "event_idx": 1 << lib.VIRTIO_F_EVENT_IDX,
    "indirect": 1 << lib.VIRTIO_F_INDIRECT_DESC,
    "both": 1 << lib.VIRTIO_F_EVENT_IDX | 1 << lib.VIRTIO_F_INDIRECT_DESC,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vdev, as installed, with a disk in a file."""
    file = tmp_path_factory.mktemp("disk") / "image"
    file.write_bytes(bytes(SIZE))
    with Server(VDEV, Image(SIZE, file), cpu=None) as server:
        server.go_on()
        yield server


@pytest.mark.parametrize("poll", [False, True], ids=["sleeping", "polling"])
@pytest.mark.parametrize("ring", RINGS)
def test_every_byte_is_kept(server: Server, ring: str, poll: bool) -> None:
    with Frontend(server.path, features=RINGS[ring]) as frontend:
        assert frontend.capacity == SIZE
        load = Load(requests=4000, write_percent=40, verify=True, poll=poll)
        outcome = frontend.run(load)
        assert (outcome.requests, outcome.errors, outcome.corrupt) == (4000, 0, 0)
        again = frontend.run(Load(requests=SIZE // 4096, random=False, verify=True, poll=poll))
        assert (again.errors, again.corrupt) == (0, 0)


def test_front_ends_follow_one_another_over_the_same_data(server: Server) -> None:
    for seed in range(10):
        with Frontend(server.path) as frontend:
            load = Load(requests=200, write_percent=50, verify=True, seed=seed, poll=False)
            outcome = frontend.run(load)
            assert (outcome.errors, outcome.corrupt) == (0, 0)


def test_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="qemu-system-common"):
        servers.find_tool("qemu-storage-daemon")


# -- the arithmetic of a measurement --------------------------------------------------------

PEERS = (Kind("slow", "qemu-storage-daemon"), Kind("fast", "qemu-storage-daemon"))
ROW = Row("row", "null", Load(), PEERS, required=True)
NEAR, FAR = Distance(FAR_NS / 2), Distance(FAR_NS * 2)


def window(
    server: str,
    requests: int,
    *,
    cpu: float = 1.0,
    before: Distance = NEAR,
    after: Distance = NEAR,
    others: float = 0.0,
    errors: int = 0,
) -> Window:
    outcome = Outcome(requests, 0, errors, 0, 0, 0, 1.0, 1.0, (requests,))
    return Window(server, 0, outcome, cpu, before, after, others)


def one_round(vdev: Window, slow: Window, fast: Window) -> dict[str, Window]:
    return {"vdev": vdev, "slow": slow, "fast": fast}


def test_the_best_peer_counts() -> None:
    measured = Measured(ROW, 3)
    for _ in range(3):
        measured.rounds.append(
            one_round(window("vdev", 300, cpu=0.3), window("slow", 100), window("fast", 200))
        )
    assert measured.peer == "fast"
    assert measured.ratio(iops) == 1.5
    assert measured.ratio(cpu_us) == pytest.approx(0.2)
    assert measured.failures == []


def test_only_rounds_of_one_distance_are_compared() -> None:
    near = one_round(window("vdev", 200), window("slow", 100), window("fast", 100))
    far = one_round(*(window(n, 50, before=FAR, after=FAR) for n in ("vdev", "slow", "fast")))
    moved = one_round(window("vdev", 1, after=FAR), window("slow", 900), window("fast", 900))
    measured = Measured(ROW, 2, [near, far, moved, near])
    assert measured.placement == "near"
    assert measured.counting == [near, near]
    assert measured.ratio(iops) == 2.0


def test_disturbed_rounds_count_only_where_there_are_no_others() -> None:
    calm = one_round(window("vdev", 200), window("slow", 100), window("fast", 100))
    busy = one_round(
        window("vdev", 10, others=0.5), window("slow", 100), window("fast", 100, others=0.5)
    )
    assert Measured(ROW, 1, [busy, calm]).counting == [calm]
    alone = Measured(ROW, 1, [busy])
    assert not alone.calm
    assert alone.counting == [busy]


def test_being_behind_is_a_failure() -> None:
    behind = one_round(window("vdev", 90, cpu=1.1), window("slow", 10), window("fast", 100))
    assert len(Measured(ROW, 1, [behind]).failures) == 2
    broken = one_round(window("vdev", 500, errors=1), window("slow", 10), window("fast", 100))
    assert Measured(ROW, 1, [broken]).failures == ["row: requests failed"]


def test_cores_that_never_kept_their_distance_are_a_failure() -> None:
    moved = one_round(window("vdev", 9, after=FAR), window("slow", 1), window("fast", 1))
    measured = Measured(ROW, 1, [moved])
    assert measured.counting == []
    assert measured.failures == ["row: the cores never kept their distance"]
