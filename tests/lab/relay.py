"""A pytest plugin for runs inside the KVM lab: tells the outside of every test as it goes.

What it writes to the file that ``VDEV_LAB_EVENTS`` names is one JSON object a line, with one key:
``start`` and ``finish`` (a test's id), ``report`` (pytest's own form of a report), ``collect`` (the
text of an error in collecting). ``inner_tests.py`` reads them.
"""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

import pytest

from .kvm import EVENTS


class _Relay:
    def __init__(self, config: pytest.Config, port: TextIO) -> None:
        self._config = config
        self._port = port

    def _send(self, kind: str, value: Any) -> None:
        # What a test has put into its report may be anything; it is shown, not used.
        self._port.write(json.dumps({kind: value}, default=repr) + "\n")
        self._port.flush()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._send("collect", report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._send("report", hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send("finish", nodeid)

    def pytest_unconfigure(self) -> None:
        self._port.close()


def pytest_configure(config: pytest.Config) -> None:
    """Open the port; it stays open until the end of the run."""
    port = open(os.environ[EVENTS], "w", encoding="utf-8")  # noqa: SIM115
    config.pluginmanager.register(_Relay(config, port), "vdev-relay")
