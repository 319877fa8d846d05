"""``python -m perf`` as a user runs it: its files, its exit codes, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf import images, results
from perf.results import Run
from tests.perf.rows import row, run

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).with_name("bad_servers.py")
SHORT = ("--pairs", "1", "--seconds", "0.05")


def perf(*arguments: str | Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perf", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )


def latest(output: Path) -> Run:
    return results.read(output / "latest.json")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where sockets and logs of a run lie; their paths have to be short."""
    path = tmp_path / "t"
    path.mkdir()
    return path


def test_a_run_leaves_json_and_a_page_and_nothing_else(tmp_path: Path, temporary: Path) -> None:
    output = tmp_path / "out"
    images_before = set(images.TMPFS.glob("perf-*.img"))
    done = perf(
        *("run", "blk", "--only", "verify", "--server", "vdev", "--server", "qsd"),
        *(*SHORT, "--output", output),
        temporary=temporary,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (suite,) = latest(output).suites
    (found,) = suite.rows
    assert [server.name for server in found.servers] == ["vdev", "qsd"]
    assert found.verified
    assert "verify" in done.stdout
    (page,) = output.glob("*.html")
    assert f"Report: {os.path.relpath(page, ROOT)}" in done.stdout
    assert list(temporary.iterdir()) == []
    assert set(images.TMPFS.glob("perf-*.img")) == images_before

    again = perf(
        "report", output / "latest.json", "--page", tmp_path / "p.html", temporary=temporary
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "p.html").stat().st_size == page.stat().st_size


def test_a_server_that_lies_fails_the_run_which_goes_on(tmp_path: Path, temporary: Path) -> None:
    output = tmp_path / "out"
    done = perf(
        *("run", "blk", "--only", "verify", "--server", "vdev", "--server", "lies"),
        *("--plugin", PLUGIN, *SHORT, "--output", output),
        temporary=temporary,
    )
    assert done.returncode == 3
    ((found, failure),) = latest(output).failures
    assert (failure.server, failure.kind) == ("lies", results.WRONG_DATA)
    assert found.base
    for text in ("wrong data", "this one lies"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nosuch"), "there is no suite 'nosuch'"),
        (("run", "blk", "--only", "zzz"), "no workload's name holds 'zzz'"),
        (("run", "blk", "--server", "nobody"), "there is no server 'nobody'"),
        (("run", "blk", "--server", "a=vdev"), "NAME=KNOWN:COMMAND"),
        (("run", "blk", "--tool", "fio=/nowhere"), "/nowhere is no program"),
        (("run", "blk", "--plugin", "/nowhere.py"), "/nowhere.py is no Python file"),
        (("run", "blk", "--cpus", "0,0"), "two different CPUs"),
        (("run", "blk", "--pairs", "0"), "at least 1"),
        (("report", "/nowhere.json"), "/nowhere.json"),
        (("compare", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, temporary: Path
) -> None:
    done = perf(*arguments, temporary=temporary)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(temporary.iterdir()) == []


def test_compare_tells_better_from_worse(tmp_path: Path, temporary: Path) -> None:
    old, new, one = (tmp_path / f"{name}.json" for name in ("old", "new", "one"))
    results.write(run(row({"vdev": [100.0] * 5, "qsd": [50.0] * 5})), old)
    results.write(run(row({"vdev": [80.0] * 5, "qsd": [50.0] * 5})), new)
    results.write(run(row({"vdev": [80.0] * 5})), one)
    assert perf("compare", old, old, temporary=temporary).returncode == 0
    worse = perf("compare", old, new, temporary=temporary)
    assert worse.returncode == 1
    assert "worse" in worse.stdout
    assert perf("compare", new, old, temporary=temporary).returncode == 0
    assert perf("compare", old, new, "--threshold", "0.3", temporary=temporary).returncode == 0
    assert perf("compare", old, "--servers", "vdev", "qsd", temporary=temporary).returncode == 1
    assert perf("compare", old, "--servers", "qsd", "vdev", temporary=temporary).returncode == 0
    nothing = perf("compare", old, one, temporary=temporary)
    assert nothing.returncode == 2
    assert "nothing can be compared" in nothing.stderr


def test_list_knows_every_suite_and_server(temporary: Path) -> None:
    done = perf("list", "--json", "--plugin", PLUGIN, temporary=temporary)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    suites = {"blk", "blk-guest", "net", "net-guest", "rings", "scale", "start"}
    assert set(listed["suites"]) == suites
    assert {"vdev", "qsd", "spdk", "testpmd", "ch-block", "lies"} <= set(listed["servers"])
    assert listed["servers"]["vdev"].startswith("vdev ")
    assert perf("list", temporary=temporary).returncode == 0


def children(pid: int) -> set[int]:
    """All processes below this one."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        found = {int(c) for t in tasks for c in (t / "children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return found.union(*map(children, found))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("suite", ["blk", "net"])
def test_an_interrupted_run_leaves_nothing_behind(
    suite: str, number: signal.Signals, tmp_path: Path, temporary: Path
) -> None:
    hugepages = Path("/proc/sys/vm/nr_hugepages").read_text()
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "perf", "run", suite, "--pairs", "50", "--output", output],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Sockets are there once servers are: that is the middle of a run.
    while not any(path.is_socket() for path in temporary.glob("*/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    started = children(process.pid)
    process.send_signal(number)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert started
    assert not [pid for pid in started if is_running(pid)]
    assert list(temporary.iterdir()) == []
    assert Path("/proc/sys/vm/nr_hugepages").read_text() == hugepages
    assert latest(output).interrupted
