"""Real servers under a real load, good ones and bad ones; the run goes on with the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import images, servers, tools
from perf.frontend import blk
from perf.frontend.blk import Pattern
from perf.loads.blk import NativeBlk
from perf.loads.scale import Scale
from perf.model import Disk, Load, Suite, Workload
from perf.results import DIED, ERRORS, HUNG, WRONG_DATA, Row
from perf.run import Options, run_suite
from tests.perf import bad_servers

OPTIONS = Options(pairs=1, seconds=0.05)
LOAD = NativeBlk("tmpfs", Pattern(depth=8, write_percent=50, verify=True))


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = dict(servers._all())
    servers.add_plugin(Path(bad_servers.__file__))
    monkeypatch.setattr(images, "SIZE", 8 << 20)
    # A hung server is given up sooner than in a measurement, where minutes are at stake.
    monkeypatch.setattr(blk, "STALL_MS", 500)
    yield
    servers._known.clear()
    servers._known.update(known)


def run(*names: str, load: Load = LOAD, options: Options = OPTIONS) -> Row:
    workload = Workload("w", load, names, "series", ("iops", "server_cpu_us"), verified=True)
    rows: list[Row] = []
    said: list[tuple[str, float]] = []
    suite = Suite("s", "S", [workload])
    run_suite(suite, [workload], options, [], [], lambda *what: said.append(what), rows.append)
    assert said[-1] == ("s done", 1.0)
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    (row,) = rows
    return row


def test_two_good_servers_are_compared() -> None:
    row = run("vdev", "qsd")
    assert row.failures == []
    assert row.base
    assert row.again
    assert [peer.name for peer in row.peers] == ["qsd"]
    windows = [*row.base.windows, *row.peers[0].windows, *row.again.windows]
    for window in windows:
        assert window.metrics["iops"] > 0
        assert window.metrics["server_cpu_us"] > 0
        assert window.metrics["latency_p50_us"] <= window.metrics["latency_p99_us"]
    assert sum(row.base.latency.values()) > 0
    assert row.base.version.startswith("vdev ")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("dies", DIED, "was ended by SIGKILL"),
        ("hangs", HUNG, "no answer for 0.5 s"),
        ("lies", WRONG_DATA, "wrong of"),
        ("fails", ERRORS, "errors, 0 wrong of"),
    ],
)
def test_a_server_that_goes_wrong_leaves_and_the_rest_goes_on(
    how: str, kind: str, message: str
) -> None:
    row = run("vdev", how)
    (failure,) = row.failures
    assert (failure.server, failure.kind) == (how, kind)
    assert message in failure.message
    assert failure.log[-1] == f"this one {how}"
    assert row.base
    assert row.base.windows


def test_a_base_that_goes_wrong_leaves_its_peers_measured() -> None:
    row = run("dies", "vdev", options=Options(pairs=2, seconds=0.05, again=False))
    assert row.base is None
    assert [failure.kind for failure in row.failures] == [DIED]
    assert len(row.peers[0].windows) >= 2


@pytest.mark.parametrize("base", ["stillborn", "unable"])
def test_no_peer_is_taken_for_a_base_that_cannot_be_had(base: str) -> None:
    row = run(base, "vdev", "qsd")
    assert row.servers[0].name == base
    assert row.base is None
    assert row.again is None
    assert [peer.name for peer in row.peers] == ["vdev", "qsd"]


def test_a_server_that_does_not_start_is_reported_with_its_log() -> None:
    row = run("vdev", "stillborn")
    (failure,) = row.failures
    assert failure.kind == DIED
    assert "exit code 3" in failure.message
    assert failure.log == ["cannot start"]
    assert row.base


def test_what_a_server_cannot_do_is_said_and_is_no_failure() -> None:
    row = run("vdev", "unable")
    assert row.failures == []
    assert row.absent == {"unable": "unable serves nothing"}


def test_a_missing_program_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tools, "_SBIN", ())
    programs = {name: tools.find_tool(name) for name in ("setpriv", "taskset")}
    monkeypatch.setattr(tools, "_named", programs)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = run("vdev", "qsd", "spdk")
    assert "qemu-system-common" in row.absent["qsd"]
    assert "--tool vhost=PATH" in row.absent["spdk"]
    assert row.base
    assert row.failures == []


@pytest.mark.parametrize(
    "load",
    [Scale(devices=3), Scale(queues=3), Scale(devices=3, loaded=False)],
    ids=["disks", "queues", "connections"],
)
def test_many_at_once_keep_every_byte(load: Scale) -> None:
    row = run("vdev", "qsd", load=load)
    assert row.failures == []
    for server in (*row.servers, row.again):
        assert server
        assert all(w.metrics["memory_mib"] > 0 for w in server.windows)
        assert server.windows


def test_known_servers_by_another_command() -> None:
    assert servers.add_variant("old=vdev:/opt/old/bin/vdev --flag") == "old"
    launch = servers.find("old").blk([Disk(Path("s"), 1 << 20)], Path("/nowhere"))
    assert list(launch.command[:4]) == ["/opt/old/bin/vdev", "--flag", "blk", "serve"]
    for text in ("old", "=vdev:x", "old=vdev", "old=vdev:"):
        with pytest.raises(servers.UnknownServer, match="NAME=KNOWN:COMMAND"):
            servers.add_variant(text)
    with pytest.raises(servers.UnknownServer, match="known: "):
        servers.add_variant("old=nobody:x")
