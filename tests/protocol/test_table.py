"""The table is whole, and agrees with those who act on it."""

from __future__ import annotations

import inspect

import pytest

from vdev._native import ffi, lib
from vdev.virtio.vhost_user.backend import Backend
from vdev.virtio.vhost_user.session import Session
from vdev.virtio.vhost_user.table import PROTOCOL_FEATURES, ROWS, TABLE, Row

EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_every_message_of_the_header_has_one_row() -> None:
    assert set(TABLE) == set(ffi.typeof("enum vhost_user_request").elements)
    assert len(TABLE) == len(ROWS)
    assert len({row.handler for row in ROWS}) == len(ROWS)


@EVERY
def test_handler_is_named_after_its_message(row: Row) -> None:
    assert row.handler == row.name.lower()


@EVERY
def test_somebody_acts_on_it(row: Row) -> None:
    effects = hasattr(Backend, row.handler)
    moves = hasattr(Session, f"commit_{row.handler}")
    assert (effects or moves) == (row.refusal is None)
    if row.refusal is None and row.reply is not None:
        assert effects


def test_nobody_acts_on_what_is_not_in_the_table() -> None:
    handlers = {row.handler for row in ROWS}
    for name, _ in inspect.getmembers(Session, inspect.isfunction):
        for prefix in ("check_", "commit_"):
            if name.startswith(prefix) and name != "check_vring_fd":
                assert name.removeprefix(prefix) in handlers


@EVERY
def test_what_is_refused_is_not_offered(row: Row) -> None:
    every = PROTOCOL_FEATURES | 1 << lib.VHOST_USER_PROTOCOL_F_MTU
    every |= 1 << lib.VHOST_USER_PROTOCOL_F_RARP
    every |= 1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    if row.protocol_feature is not None:
        assert bool(every >> row.protocol_feature & 1) == (row.refusal is None)
