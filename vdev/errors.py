"""Errors by whose fault they are; each kind has one answer.

A `UserError` ends a command with exit code 2 and one line on stderr; a `PeerError` gives the
front-end an error reply or closes its connection.  The guest's own faults never become Python
exceptions: the native half answers them with a status, or breaks that one ring.
"""

from __future__ import annotations


class VdevError(Exception):
    """Base of all errors of vdev.

    `str(error)` is one clear line: what was given, what is wrong with it, what would be right.
    """


class UserError(VdevError):
    """The user's mistake, or something that the host lacks: exit code 2, never a traceback."""


class PeerError(VdevError):
    """The front-end broke the protocol: an error reply, or its connection is closed."""


class NotSupported(PeerError):
    """The front-end asked for a part of the protocol that was not offered to it."""
