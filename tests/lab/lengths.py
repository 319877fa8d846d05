"""A pytest plugin: tests marked ``long`` wait for ``--all``, or for being named.

Long are repetitions, combinations and sizes beyond what shows that something works: a hundred
kills where twenty are made anyway, the other transport, sixteen processors. What is left out is
counted as deselected, and the summary says how to run it.
"""

from __future__ import annotations

import pytest

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all."""
    parser.addoption("--all", action="store_true", help="the tests marked 'long' too")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line("markers", "long: left out unless --all is given or it is named")
    config.stash[_left_out] = 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long ones out."""
    if config.getoption("--all"):
        return
    named = {argument for argument in config.args if "::" in argument}
    beginnings = tuple(f"{name}{mark}" for name in named for mark in ("[", "::"))
    out = [
        item
        for item in items
        if item.get_closest_marker("long")
        and item.nodeid not in named
        and not item.nodeid.startswith(beginnings)
    ]
    if not out:
        return
    config.hook.pytest_deselected(items=out)
    config.stash[_left_out] = len(out)
    left_out = set(out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and how to have it."""
    if count := terminalreporter.config.stash[_left_out]:
        terminalreporter.write_line(f"{count} long tests were left out: make test-all runs them")
