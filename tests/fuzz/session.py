"""A fuzz target: a connection's bytes, through the decoder into a session.

The input is what a front-end sends. A byte before each message says how many descriptors come
with it; the sizes in headers are believed as far as there are bytes, as on a socket.
"""

from __future__ import annotations

import sys

from tests.protocol.test_fuzz import check_invariants
from tests.protocol.test_session import new
from vdev.errors import PeerError
from vdev.virtio.vhost_user.codec import Decoder

MESSAGES = 64


def run(data: bytes) -> None:
    """Raises whatever is not a refusal."""
    session, at = new(), 0
    decoder = Decoder()
    for _ in range(MESSAGES):
        if at >= len(data):
            return
        fds, at = list(range(data[at] % 10)), at + 1
        try:
            while (message := decoder.next_message()) is None:
                if at >= len(data):
                    decoder.end()
                    return
                wanted = decoder.wanted
                decoder.feed(data[at : at + wanted], fds)
                at, fds = at + wanted, []
        except PeerError:
            return
        try:
            request = session.check(message)
        except PeerError:
            continue
        session.commit(request)
        check_invariants(session)


def main() -> None:
    """Fuzz, with libFuzzer's arguments."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
