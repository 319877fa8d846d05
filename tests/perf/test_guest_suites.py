"""The guest suites: their data, and one short window on real guests."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from perf import servers
from perf.guest.blk import FioGuest
from perf.guest.net import NetGuest, Stream, Tcp
from perf.guest.target import GuestTarget
from perf.model import METRICS, Load, Place, Suite, Target
from perf.serving import directory
from perf.suites import all_suites
from tests.lab import host

SUITES = ("blk-guest", "net-guest")
JOBS = Path(__file__).parents[2] / "perf/fio"
READ = FioGuest("tmpfs", "timed.fio", {"RW": "randread", "BS": "4k", "DEPTH": "8"})
SECONDS = 0.2


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> Suite:
    return all_suites()[request.param]


def test_workloads_have_names_and_series_of_their_own(suite: Suite) -> None:
    names = [workload.name for workload in suite.workloads]
    assert len(set(names)) == len(names)
    series = [workload.series for workload in suite.workloads]
    assert len(set(series)) == len(series)


def test_servers_and_metrics_are_known(suite: Suite) -> None:
    for workload in suite.workloads:
        assert workload.servers[0] == "vdev"
        assert len(workload.servers) >= 2
        for name in workload.servers:
            assert servers.find(name).name == name
        assert set(workload.compared) <= set(METRICS)


def test_something_is_verified(suite: Suite) -> None:
    assert any(workload.verified for workload in suite.workloads)


def test_job_files_are_there_and_get_all_their_variables() -> None:
    for workload in all_suites()["blk-guest"].workloads:
        assert isinstance(workload.load, FioGuest)
        job = (JOBS / workload.load.job).read_text()
        assert all(f"${{{name}}}" in job for name in workload.load.variables)


@contextlib.contextmanager
def attached(load: Load, name: str) -> Iterator[Target]:
    with directory() as place:
        try:
            with load.attach(servers.find(name), Place(0, 1, place)) as target:
                yield target
        finally:
            assert not _processes_with(str(place)), "something was left running"


def _processes_with(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in command:
                found.append(command)
    return found


@pytest.fixture
def guests() -> None:
    lacks = host.lacks_guest()
    if lacks:
        pytest.skip(lacks)


@pytest.fixture
def networks(guests: None) -> None:
    lacks = host.lacks_network()
    if lacks:
        pytest.skip(lacks)


@pytest.mark.usefixtures("guests")
@pytest.mark.parametrize("name", ["vdev", pytest.param("qemu-virtio-blk", marks=pytest.mark.long)])
def test_fio_in_a_guest_that_rests_between_windows(name: str) -> None:
    with attached(READ, name) as target:
        target.rest()
        assert isinstance(target, GuestTarget)
        used = target.backend.used()
        time.sleep(0.2)
        rested = target.backend.used() - used
        assert rested.server + rested.vmm < 0.02, "at rest it uses no CPU"
        target.go_on()
        sample = target.measure(SECONDS)
        target.rest()
        assert target.alive() is None
    assert (sample.errors, sample.corrupt) == (0, 0)
    assert sum(sample.latency.values()) == sample.operations > 0
    metrics = sample.metrics
    assert 0 < metrics["latency_p50_us"] <= metrics["latency_p99_us"]
    assert metrics["server_cpu_us"] > 0
    assert metrics["vmm_cpu_us"] > 0
    assert 0 < sample.own_cpu_seconds <= sample.seconds * (os.cpu_count() or 1)


@pytest.mark.usefixtures("guests")
def test_a_verifying_job_passes_window_after_window_and_sees_wrong_data() -> None:
    load = FioGuest("tmpfs", "verify.fio", {"BS": "4k-64k", "DEPTH": "8"}, mib_per_second=16)
    with attached(load, "vdev") as target:
        for _ in range(2):
            sample = target.measure(SECONDS)
            assert (sample.errors, sample.corrupt) == (0, 0)
            assert sample.operations > 0
        assert isinstance(target, GuestTarget)
        with _scribbled(_image_of(target.backend.pid)):
            assert target.measure(SECONDS).corrupt > 0


def _image_of(pid: int) -> Path:
    opened = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    (image,) = (name for name in opened if name.endswith(".img"))
    return Path(image)


@contextlib.contextmanager
def _scribbled(image: Path) -> Iterator[None]:
    """Overwrites a block of the image all the time."""
    stop = threading.Event()

    def scribble() -> None:
        with image.open("r+b", buffering=0) as file:
            while not stop.wait(0.001):
                file.seek(1 << 20)
                file.write(b"\xff" * 4096)

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("name", ["vdev", pytest.param("qemu-virtio-net", marks=pytest.mark.long)])
def test_a_stream_comes_back_whole(name: str) -> None:
    with attached(NetGuest(Stream), name) as target:
        target.rest()
        target.go_on()
        sample = target.measure(SECONDS)
        assert target.alive() is None
    assert (sample.operations, sample.corrupt) == (4, 0)
    assert sample.metrics["bits_per_second"] > 0
    assert sample.metrics["server_cpu_us"] > 0


@pytest.mark.usefixtures("guests")
@pytest.mark.long
def test_a_server_killed_in_a_window_is_reported_and_nothing_is_left() -> None:
    with attached(READ, "vdev") as target:
        assert isinstance(target, GuestTarget)
        kill = threading.Timer(0.5, os.kill, (target.backend.pid, signal.SIGKILL))
        kill.start()
        start = time.monotonic()
        with pytest.raises(OSError, match="SIGKILL"):
            target.measure(60)
        assert time.monotonic() - start < 30, "long before the window's end"
        assert target.alive() == "was ended by SIGKILL"
        target.rest()
        assert isinstance(target.log_tail(), list)


@pytest.mark.usefixtures("guests")
def test_an_interrupt_in_a_window_leaves_nothing() -> None:
    def window() -> None:
        with attached(READ, "qemu-virtio-blk") as target:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            target.measure(60)

    with pytest.raises(KeyboardInterrupt):
        window()


@pytest.mark.usefixtures("networks")
@pytest.mark.long
def test_a_server_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(NetGuest(partial(Tcp, reverse=True)), "vdev") as target:
        monkeypatch.setattr("perf.guest.target.START_SECONDS", 1.0)
        monkeypatch.setattr("perf.guest.target.MONITOR_SECONDS", 0.5)
        assert isinstance(target, GuestTarget)
        pid = target.backend.pid
        (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="did not end in time; the guest's shell answers"):
            target.measure(SECONDS)
        assert target.alive() is None
        target.rest()
