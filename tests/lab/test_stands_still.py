"""A lab whose CPU stands still is told from one that works, and its tests run in another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import inner_tests, outer
from tests.lab.inner_tests import ATTEMPTS, InnerTests
from tests.lab.kvm import LAB_FAILED, LAB_STANDS_STILL


async def _code_of(words: list[bytes], copied: bool = True) -> int:
    """What is made of these lines from a lab of two CPUs, which stays connected."""
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        copies: asyncio.Future[list[None]] = asyncio.get_running_loop().create_future()
        if copied:
            copies.set_result([])
        theirs.sendall(b"".join(words))
        try:
            return await outer._code(outer._Port(reader, writer, theirs), 2, copies)
        finally:
            writer.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "STILL", 0.2)
    monkeypatch.setattr(outer, "_BEAT_CHECK", 0.01)


async def test_the_exit_code_comes_between_signs_of_life() -> None:
    assert await _code_of([b"alive 0\n", b"alive 1\n", b"alive 0\n", b"exit 3\n"]) == 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("words", "cpu"), [([], 0), ([b"alive 0\n"] * 3, 0), ([b"alive 1\n"], 0)])
async def test_silence_is_noticed(words: list[bytes], cpu: int) -> None:
    with pytest.raises(outer._StandsStill, match=rf"CPU [{cpu}1] of the lab stands still"):
        await _code_of(words, copied=False)


class FakeRun:
    """Labs in a row: what each sends, and how it ends."""

    labs: list[tuple[list[dict[str, Any]], int]]
    started: list[list[str]]

    def __init__(self, nodeids: list[str], results: Path) -> None:
        self.started.append(nodeids)
        self._events, self._code = self.labs.pop(0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._events)

    def last_words(self) -> str:
        return "last words"

    def end(self) -> int:
        return self._code


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([LAB_STANDS_STILL], ""),
        ([LAB_STANDS_STILL] * (ATTEMPTS - 1), ""),
        ([LAB_STANDS_STILL] * ATTEMPTS, "last words"),
        ([LAB_FAILED], ""),
        ([LAB_STANDS_STILL, LAB_FAILED], ""),
        ([LAB_FAILED] * ATTEMPTS, "last words"),
    ],
    ids=["once", "a few times", "always", "another end", "and another end", "always another"],
)
def test_tests_have_another_lab_where_it_is_not_their_fault(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    said: str,
) -> None:
    item = request.node
    ends = [([{"start": item.nodeid}], code) for code in codes]
    FakeRun.labs = [*ends, ([{"start": item.nodeid}, {"finish": item.nodeid}], 0)]
    FakeRun.started = []
    monkeypatch.setattr(inner_tests, "LabRun", FakeRun)
    inner = InnerTests([], request.config)
    assert (said in inner._wait_for(item)) if said else inner._wait_for(item) == ""
    assert [nodeid for nodeid, _ in inner.again] == [item.nodeid] * (len(codes) - bool(said))
    assert FakeRun.started == [[item.nodeid]] * (len(codes) + (not said))


@pytest.mark.parametrize("failures", [0, 1, ATTEMPTS - 1, ATTEMPTS])
def test_only_what_fails_in_each_lab_has_failed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    item = request.node
    outcomes = ["failed"] * failures + ["passed"] * (failures < ATTEMPTS)
    FakeRun.labs = [
        (
            [{"start": item.nodeid}, {"report": _report(item, outcome)}, {"finish": item.nodeid}],
            0,
        )
        for outcome in outcomes
    ]
    FakeRun.started = []
    monkeypatch.setattr(inner_tests, "LabRun", FakeRun)
    inner = InnerTests([], request.config)
    reports = inner._reports_of(item)
    assert [report.outcome for report in reports] == outcomes[-1:]
    assert [nodeid for nodeid, _ in inner.again] == [item.nodeid] * (len(outcomes) - 1)


def _report(item: pytest.Item, outcome: str) -> dict[str, Any]:
    report = inner_tests._report(item, outcome, "AssertionError: said", "call")
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    return dict(data)
