"""The device status: which step a driver may take from which."""

from __future__ import annotations

import pytest

from tests.protocol.test_session import agreed, refused, say


@pytest.mark.parametrize(
    ("before", "after", "good"),
    [
        (0, 1, True),
        (0, 3, True),
        (0, 8, True),
        (0, 4, False),
        (0, 7, False),
        (0, 15, True),
        (15, 11, False),
        (15, 14, False),
        (15, 143, True),
        (15, 0, True),
        (0, 16, False),
        (0, 32, False),
        (0, 256, False),
        (0, 1 << 40, False),
    ],
)
def test_status(before: int, after: int, good: bool) -> None:
    session = agreed()
    session.status = before
    if good:
        say(session, "SET_STATUS", after)
        assert session.status == after
    else:
        refused(session, "SET_STATUS", after)
