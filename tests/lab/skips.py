"""A pytest plugin: with ``CI=true`` a skip that is not on the short list fails the run.

A test may be skipped only for what the host lacks, and the reason says what that is. On a
developer's machine skips are listed; in CI, where the set-up has installed everything, a skip
means that something is no longer tested.
"""

from __future__ import annotations

import os
import re

import pytest

# Reasons (regular expressions) that stand for something a CI machine may really lack.
ALLOWED = (
    # Hardware virtualization: CI machines are often virtual machines themselves.
    r"no usable KVM here",
    # Containers: seccomp profiles refuse io_uring (the thread engine is tested all the same), and
    # their temporary directory may be on tmpfs or overlayfs.
    r"this kernel refuses io_uring",
    r"no file system with delayed allocation",
    # Kernels built or booted without them; RAM is then what the other tests of it look at.
    r"transparent huge pages are not to be had",
)

_PREFIX = "Skipped: "
_unexpected = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start with an empty list."""
    config.stash[_unexpected] = []


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why this was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix(_PREFIX)
    return str(report.longrepr)


def allowed(reason: str) -> bool:
    """Whether a skip for this reason is on the list."""
    return any(re.search(pattern, reason) for pattern in ALLOWED)


class _Watch:
    """Notes every skip that is not on the list, of tests and of whole modules."""

    def __init__(self, config: pytest.Config) -> None:
        self._notes = config.stash[_unexpected]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure is reported as skipped too, but it did run.
        if report.skipped and not hasattr(report, "wasxfail") and not allowed(reason_of(report)):
            self._notes.append(f"{report.nodeid}: {reason_of(report)}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Watch only in CI."""
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        session.config.pluginmanager.register(_Watch(session.config), "vdev-skips")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail an otherwise good run."""
    if session.config.stash[_unexpected] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips were to blame."""
    notes = terminalreporter.config.stash[_unexpected]
    if notes:
        terminalreporter.section("skips that are not on the list in tests/lab/skips.py", red=True)
        for note in notes:
            terminalreporter.write_line(note)
