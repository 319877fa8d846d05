"""What the comparison of machines makes of what guests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import machines
from perf.machines import Run

SAID = b"""[    1.250000] Run /init as init process\r
MARK fio\r
MARK fio-end\r
      "iops" : 4000.5,\r
      "total_ios" : 20000,\r
MARK up\r
MARK up-end\r
\t\t\t"bits_per_second":\t1.5e+08,\r
MARK down\r
MARK down-end\r
\t\t\t"bits_per_second":\t250000000.0,\r
MARK idle\r
MARK idle-end\r
"""


@pytest.fixture
def exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "exits"
    path.write_text("0\n")
    monkeypatch.setattr(machines, "_EXITS", path)
    return path


def test_figures(exits: Path) -> None:
    run = Run()
    cpu = 0.0
    for line in SAID.splitlines(keepends=True):
        exits.write_text(f"{int(exits.read_text()) + 10000}\n")
        cpu += 0.5
        # A mark counts when it came first, whatever comes in pieces later.
        for piece in (line[:4], line[4:]):
            run.feed(piece, lambda now=cpu: now)  # type: ignore[misc]
    figures = run.figures()
    assert figures["init after (s)"] == 1.25
    assert figures["4 KiB reads a second"] == 4000.5
    assert figures["exits a read"] == 10000 / 20000
    assert figures["VMM CPU a read (µs)"] == pytest.approx(1e6 * 0.5 / 20000)
    assert (figures["TCP up (Mbit/s)"], figures["TCP down (Mbit/s)"]) == (150.0, 250.0)


@pytest.mark.parametrize("lost", [b"Run /init", b'"iops"', b'"total_ios"', b"bits_per_second"])
def test_a_guest_that_says_less_is_an_error(exits: Path, lost: bytes) -> None:
    run = Run()
    run.feed(SAID.replace(lost, b"nothing", 1), lambda: 0.0)
    with pytest.raises(ValueError, match="the guest said"):
        run.figures()
