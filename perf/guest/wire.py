"""A network namespace with a bridge, on which the host's end of a guest's network has an address.

Everything in it ends with the last process in it, so that nothing can be left behind, and it
clashes with nothing.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

from perf.tools import find_tool

TAP = "tap0"
MAC = "52:54:00:00:00:02"
HOST = "10.0.0.1"
GUEST_CIDR = "10.0.0.2/24"
_BRIDGE = "perf0"


class Wire:
    """The network namespace of a running process."""

    def __init__(self, pid: int) -> None:
        self._enter = [find_tool("nsenter"), f"--net=/proc/{pid}/ns/net", "--"]

    def command(self, program: Sequence[str]) -> list[str]:
        """A command that runs a program in the namespace."""
        return [*self._enter, *program]

    def bridge_tap(self) -> None:
        """Makes a bridge with the tap as its port. Raises OSError."""
        self._ip("link", "add", _BRIDGE, "type", "bridge")
        self._ip("link", "set", TAP, "master", _BRIDGE, "up")

    def address_bridge(self) -> None:
        """Gives the host's address to the only bridge. Raises OSError."""
        bridges = json.loads(self._ip("-json", "link", "show", "type", "bridge") or "[]")
        names = [bridge["ifname"] for bridge in bridges if bridge]
        if len(names) != 1:
            raise OSError(f"the server made {len(names)} bridges in its network, not one")
        self._ip("address", "add", f"{HOST}/24", "dev", names[0])
        self._ip("link", "set", names[0], "up")

    def _ip(self, *words: str) -> str:
        done = subprocess.run(
            self.command([find_tool("ip"), *words]), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout
