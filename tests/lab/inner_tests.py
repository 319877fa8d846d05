"""A pytest plugin: the tests of tests/vmm/kvm run inside the KVM lab, as tests of this run.

They are collected and selected here like all others. Where this host's KVM is usable they simply
run. Elsewhere, when the first of them is due, the lab is booted with one pytest inside that runs
all that were selected, and each report is shown here as it arrives. They come last, since nothing
is set up for them on the outside.

The lab's CPU is emulated, and its SVM goes wrong now and then: a guest runs on with its host's
registers, or the host with the guest's (docs/testing.md). So a test that fails, or whose lab dies,
runs again in a new lab, and only what fails in each of them has failed. The summary names all that
ran more than once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import host
from .kvm import LAB_STANDS_STILL
from .process import tail

_TOP = Path(__file__).parents[2]
DIRECTORY = _TOP / "tests/vmm/kvm"
# Guards against a lab that hangs; above the limit that pytest sets for a test inside.
SILENCE = 480.0
ATTEMPTS = 4
VARIABLE = "VDEV_LAB_ATTEMPTS"
"""How many labs a test may have, for whoever wants to see it fail the first time."""


class LabRun:
    """One pytest in one lab. Iterating gives what relay.py sends, up to the lab's end."""

    def __init__(self, nodeids: list[str], results: Path) -> None:
        self.log = results / "pytest.log"
        self._results = results
        selected = results / "selected"
        selected.write_text("".join(f"{nodeid}\n" for nodeid in nodeids))
        ours, theirs = os.pipe()
        self._events = os.fdopen(ours, "rb", buffering=0)
        command: list[str | Path] = [
            *("setpriv", "--pdeathsig=TERM", sys.executable, "-m", "tests.lab.kvm"),
            *("--emulate", "--results", results, "--events-fd", str(theirs), "--"),
            *(sys.executable, "-m", "pytest", "-p", "tests.lab.relay", "-p", "no:cacheprovider"),
            *("-rs", "--color=no", f"@{selected}"),
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=_TOP,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        os.close(theirs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kept = b""
        while True:
            if not select.select([self._events], [], [], SILENCE)[0]:
                raise TimeoutError(f"nothing came from the lab within {SILENCE:.0f} s")
            data = self._events.read(1 << 16)
            if not data:
                return
            *lines, kept = (kept + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def last_words(self) -> str:
        """The ends of the logs."""
        logs = (self.log, self._results / "console.log")
        return "\n".join(f"the end of {log.name}:\n{tail(log)}" for log in logs)

    def end(self) -> int:
        """End the lab if it still runs; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        self._events.close()
        return self._process.wait()


class InnerTests:
    """Runs the items that belong into the lab."""

    def __init__(self, items: list[pytest.Item], config: pytest.Config) -> None:
        self._config = config
        self._results = _results(config)
        self._waiting = {item.nodeid: item for item in items}
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._finished: set[str] = set()
        self._run: LabRun | None = None
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._heard = False
        self._broken = ""
        self.outcomes: Counter[str] = Counter()
        self.again: list[tuple[str, str]] = []
        self._attempts = int(os.environ.get(VARIABLE, ATTEMPTS))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self._waiting.pop(item.nodeid, None) is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            self.outcomes[report.outcome] += report.when == "call" or not report.passed
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        lacks = host.lacks_lab()
        if lacks:
            place = (str(item.path), 0, f"Skipped: {lacks}")
            return [_report(item, "skipped", place, "setup")]
        died = self._broken or self._wait_for(item)
        reports = self._reports.pop(item.nodeid, [])
        if died:
            reports.append(_report(item, "failed", died, "call"))
        return reports

    def _wait_for(self, item: pytest.Item) -> str:
        """Take events until this test is finished; what went wrong if that never comes."""
        for left in reversed(range(self._attempts)):
            code, text = self._attempt(item)
            failed = [str(r.longrepr) for r in self._reports.get(item.nodeid, ()) if r.failed]
            if not (text or failed) or not left or self._broken:
                break
            why = "a CPU of the lab stood still" if code == LAB_STANDS_STILL else ""
            said = (text or failed[0]).strip().splitlines()
            self.again.append((item.nodeid, why or said[0 if text else -1]))
            self._reports.pop(item.nodeid, None)
            self._finished.discard(item.nodeid)
            self._end_run()
        return text

    def _end_run(self) -> None:
        if self._run:
            self._run.end()
            self._run = None

    def _attempt(self, item: pytest.Item) -> tuple[int, str]:
        """The lab's exit code, if it ended before the test did, and its last words."""
        if item.nodeid in self._finished:
            return 0, ""
        if self._run is None:
            self._run = LabRun([item.nodeid, *self._waiting], self._results)
            self._stream = iter(self._run)
            self._heard = False
        why = "the KVM lab ended before this test did"
        try:
            for event in self._stream:
                self._take(event)
                if item.nodeid in self._finished:
                    return 0, ""
        except TimeoutError as error:
            why = str(error)
        code = self._run.end()
        text = f"{why} (exit code {code})\n{self._run.last_words()}"
        self._run = None
        if not self._heard and code != LAB_STANDS_STILL:
            # A lab in which not even one test starts will not do better the next time.
            self._broken = text
        return code, text

    def _take(self, event: dict[str, Any]) -> None:
        ((kind, value),) = event.items()
        if kind == "start":
            self._heard = True
        elif kind == "finish":
            self._finished.add(value)
        elif kind == "report":
            if isinstance(value["longrepr"], list):
                value["longrepr"] = tuple(value["longrepr"])
            hook = self._config.hook
            report = hook.pytest_report_from_serializable(config=self._config, data=value)
            self._reports.setdefault(report.nodeid, []).append(report)

    def pytest_sessionfinish(self) -> None:
        self._end_run()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        terminalreporter.section("KVM lab")
        terminalreporter.write_line(f"{host.usable_kvm().reason}, so tests/vmm/kvm ran in the lab")
        terminalreporter.write_line(f"inside: {counts or 'nothing ran'}; logs: {self._results}")
        for nodeid, why in self.again:
            terminalreporter.write_line(f"ran again in another lab: {nodeid}: {why}")


def _results(config: pytest.Config) -> Path:
    """Where the logs stay: in pytest's cache directory, if it has one."""
    cache = getattr(config, "cache", None)
    if cache:
        return Path(cache.mkdir("kvm-lab"))
    return Path(tempfile.mkdtemp(prefix="vdev-kvm-lab-"))


def _report(item: pytest.Item, outcome: Any, longrepr: Any, when: Any) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, longrepr, when
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Put the inner tests last, and take them over where the host's own KVM is not usable."""
    inner = [item for item in items if DIRECTORY in item.path.parents]
    if not inner or host.usable_kvm().usable:
        return
    items[:] = [item for item in items if DIRECTORY not in item.path.parents] + inner
    for item in inner:
        # Their time is watched inside; here it would include the boot of the lab.
        item.add_marker(pytest.mark.timeout(0), append=False)
    session.config.pluginmanager.register(InnerTests(inner, session.config), "vdev-inner-tests")
