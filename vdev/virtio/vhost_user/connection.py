"""One connection from its first message to its end: read, act, answer.

Policy E.  A message that is refused gets a nonzero ack where the front-end asked for one and
REPLY_ACK was agreed; without a way to say no, the connection is closed.  Messages with an answer
of their own have no way either ("the need_reply bit … brings no behavioural change"), but for
those whose row has an `error_reply`.
"""

from __future__ import annotations

import asyncio

from vdev._native import lib
from vdev.errors import PeerError
from vdev.ratelog import RateLimitedLog
from vdev.virtio.vhost_user.backend import Backend
from vdev.virtio.vhost_user.channel import Channel, close_fds
from vdev.virtio.vhost_user.codec import REPLY, Message, encode
from vdev.virtio.vhost_user.payloads import U64
from vdev.virtio.vhost_user.table import TABLE

_F_REPLY_ACK: int = lib.VHOST_USER_PROTOCOL_F_REPLY_ACK


async def serve_connection(channel: Channel, backend: Backend, log: RateLimitedLog) -> None:
    """Serves a front-end until it leaves or breaks the protocol; closes `channel` and `backend`."""
    try:
        while (message := await channel.receive()) is not None:
            try:
                reply, fds = await _answer(message, backend, log)
            finally:
                close_fds(message.fds)
            await channel.send(reply, fds)
            # A front-end that sends without pause must not keep the loop from the others.
            await asyncio.sleep(0)
    except PeerError as error:
        log.warning("%s: connection closed: %s", backend.device.name, error)
    except OSError as error:
        log.warning("%s: connection lost: %s", backend.device.name, error)
    finally:
        # Drained before the front-end sees the end: it then takes the used rings for final, and
        # gives what is not in them to the next back-end.
        try:
            await backend.close()
        finally:
            channel.close()


async def _answer(
    message: Message, backend: Backend, log: RateLimitedLog
) -> tuple[bytes, list[int]]:
    """The reply, or nothing, and the descriptors that go with it.

    Raises where the connection must be closed.
    """
    # As agreed when the message was sent: the one that agrees on REPLY_ACK is not acked yet.
    ack = message.need_reply and backend.session.has_protocol(_F_REPLY_ACK)
    try:
        request, value = await backend.handle(message)
    except (PeerError, OSError) as error:
        no = _refusal(message, ack)
        if no is None:
            raise
        log.warning("%s: refused: %s", backend.device.name, error)
        return no, []
    if request.row.reply is not None:
        fds = [message.fds.pop() for _ in range(request.row.reply_fds)]
        return encode(message.request, request.row.reply.encode(value), REPLY), fds
    return encode(message.request, U64.encode(0), REPLY) if ack else b"", []


def _refusal(message: Message, ack: bool) -> bytes | None:
    """The reply that says no, or None where there is none."""
    row = TABLE.get(message.request)
    # More descriptors than it takes are a breach of the framing, not a wrong request.
    if row is not None and row.error_reply is not None and len(message.fds) <= row.fds[1]:
        return encode(message.request, row.error_reply, REPLY)
    if ack and (row is None or row.reply is None):
        return encode(message.request, U64.encode(1), REPLY)
    return None
