"""vhost-user, the back-end's side.

One message through the files: `channel` reads bytes and descriptors, `codec` frames them, `table`
says what is expected, `payloads` decodes, `session` checks against the state, `backend` acts on
memory, queues and device, `connection` answers.
"""

from __future__ import annotations
