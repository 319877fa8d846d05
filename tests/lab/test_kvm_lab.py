"""The KVM lab itself: what goes in, what comes out, and that nothing stays."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import cpio, host, inner_tests, kvm

_TOP = Path(__file__).parents[2]
_LAB = [sys.executable, "-m", "tests.lab.kvm", "--emulate"]


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[bytes]]:
    lacks = host.lacks_lab()
    if lacks:
        pytest.skip(lacks)

    # What a killed lab cannot remove goes with pytest's own directories.
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("lab"))}

    def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*_LAB, *arguments],
            cwd=_TOP,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def _qemus(results: Path) -> list[int]:
    """The processes of the lab with this directory of results, by their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        program = os.path.basename(words.partition(b"\0")[0])
        if program.startswith(b"qemu-") and os.fsencode(results) in words:
            found.append(int(entry.name))
    return found


def test_output_streams_and_the_exit_code_comes_out(
    lab: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The job goes on only after its first line has been seen outside."""
    script = (
        'echo first; until [ -e "$VDEV_LAB_RESULTS/go" ]; do sleep 0.1; done; '
        'echo "$WORD" >"$VDEV_LAB_RESULTS/out"; echo changed >>README.md; head -1 README.md; '
        "grep -c ' /tmp tmpfs ' /proc/mounts; stat -fc %T /sys/fs/cgroup; "
        "sleep 1000 & printf second; echo apart >&2; exit 41"
    )
    results = tmp_path / "results"
    before = (_TOP / "README.md").read_bytes()
    job = lab("--results", results, "--env", "WORD=a 'b'", "--", "sh", "-c", script)
    assert job.stdout
    assert job.stdout.readline() == b"first\n"
    (results / "go").touch()
    out, err = job.communicate()
    assert job.returncode == 41, err.decode()
    title = before.splitlines()[0]
    assert out == title + b"\n1\ncgroup2fs\nsecond"
    assert err.endswith(b"apart\n")
    assert (results / "out").read_text() == "a 'b'\n"
    assert (_TOP / "README.md").read_bytes() == before
    assert not _qemus(results)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)],
    ids=lambda n: n.name,
)
def test_a_lab_that_is_ended_leaves_nothing_running(
    lab: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    job = lab("--results", tmp_path, "--", "sh", "-c", "echo running; sleep 1000")
    assert job.stdout
    assert job.stdout.readline() == b"running\n"
    (qemu,) = _qemus(tmp_path)
    end = os.pidfd_open(qemu)
    try:
        job.send_signal(number)
        job.communicate()
        assert job.returncode == (130 if number == signal.SIGINT else -number)
        select.select([end], [], [])
    finally:
        os.close(end)
    assert not _qemus(tmp_path)


def test_a_job_that_takes_too_long_is_named(
    lab: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    job = lab("--results", tmp_path, "--limit", "0.5", "--", "sleep", "1000")
    _, err = job.communicate()
    assert job.returncode == kvm.LAB_FAILED
    assert b"the job did not end within 0.5 s" in err
    assert b"the end of the lab's console" in err
    assert not _qemus(tmp_path)


def test_a_lab_that_dies_shows_its_console(
    lab: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    job = lab("--results", tmp_path, "--", "sh", "-c", "echo c >/proc/sysrq-trigger")
    _, err = job.communicate()
    assert job.returncode == kvm.LAB_FAILED
    assert b"the lab's QEMU ended" in err
    assert b"Kernel panic" in err
    assert "Kernel panic" in (tmp_path / "console.log").read_text()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (33, 111))
    yield ours, theirs
    os.close(theirs)
    os.close(ours)


def test_a_shell_on_the_terminal(terminal: tuple[int, int]) -> None:
    lacks = host.lacks_lab()
    if lacks:
        pytest.skip(lacks)
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    job = subprocess.Popen([*_LAB, "--shell"], cwd=_TOP, stdin=theirs, stdout=theirs, stderr=theirs)
    said = b""
    while not said.endswith(b"# "):
        said += os.read(ours, 4096)
    os.write(ours, b"echo size $(stty size) at $PWD; exit 5\r")
    while f"size 33 111 at {_TOP}".encode() not in said:
        said += os.read(ours, 4096)
    assert job.wait() == 5
    assert termios.tcgetattr(theirs) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --shell or a command"),
        (["--shell", "--", "true"], "either --shell or a command"),
        (["--env", "NAME", "--", "true"], "--env NAME: not NAME=VALUE"),
        (["--shell"], "--shell needs a terminal"),
    ],
)
def test_mistakes(arguments: list[str], said: str) -> None:
    run = subprocess.run(
        [*_LAB, *arguments],
        cwd=_TOP,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert said in run.stderr


_OUTSIDE = """\
import sys
from pathlib import Path
import pytest
from tests.lab import host, inner_tests
inner_tests.DIRECTORY = Path("tests/lab/inner").resolve()
host.usable_kvm = lambda: host.Kvm(False, "not in this test")
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "--color=no", "tests/lab/inner/sample.py"]))
"""


@pytest.mark.long
def test_what_becomes_of_tests_inside_is_seen_outside(tmp_path: Path) -> None:
    """Good, bad and skipped tests; one that kills the lab, and one that follows it."""
    lacks = host.lacks_lab()
    if lacks:
        pytest.skip(lacks)
    environment = {**os.environ, "CI": "true", inner_tests.VARIABLE: "1"}
    run = subprocess.run(
        [sys.executable, "-c", _OUTSIDE],
        cwd=_TOP,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = run.stdout
    assert run.returncode == 1, said + run.stderr
    assert "sample.py::test_good PASSED" in said
    assert "sample.py::test_bad FAILED" in said
    assert "kvm-lab" in said
    assert "printed inside" in said
    assert "no moon in the lab" in said.split("skips that are not on the list")[1]
    assert "sample.py::test_kills_the_lab FAILED" in said
    assert "the KVM lab ended before this test did" in said
    assert "sysrq triggered crash" in said
    assert "sample.py::test_after_that PASSED" in said
    assert "inside: 2 failed, 2 passed, 1 skipped" in said
    assert "2 failed, 2 passed, 1 skipped" in said.splitlines()[-1]


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"\0" * 5)
    made = cpio.appended(base, {"a/b/c": b"12345", "d": b""}, tmp_path / "made").read_bytes()
    assert made[:8] == b"\0" * 8
    listing = subprocess.run(["cpio", "-it", "--quiet"], input=made[8:], capture_output=True)
    assert listing.stdout.decode().split() == ["a", "a/b", "a/b/c", "d"]
    read = ["cpio", "-i", "--quiet", "--to-stdout", "a/b/c"]
    assert subprocess.run(read, input=made[8:], capture_output=True).stdout == b"12345"


@pytest.mark.parametrize(
    ("pvm", "says"), [(True, "kvm_pvm"), (False, "/dev/kvm: Permission denied")]
)
def test_a_kvm_that_is_not_usable_is_told(
    monkeypatch: pytest.MonkeyPatch, pvm: bool, says: str
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", lambda path: pvm)
    monkeypatch.setattr(os, "open", refused)
    usable, reason = host.usable_kvm.__wrapped__()
    assert not usable
    assert says in reason
