"""``vdev-blk`` and ``vdev-net``: QEMU's back-end program conventions (docs/interop/vhost-user.rst).

One back-end a process, in the foreground, --socket-path or --fd, --print-capabilities, a clean end
on SIGTERM; JSON files in share/qemu/vhost-user tell management programs that they exist.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from vdev.cli import EXIT_OK, run
from vdev.cli.parser import (
    Version,
    add_blk_arguments,
    add_net_arguments,
    add_server_arguments,
)
from vdev.cli.parsing import Parser, command

BLK_CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}
NET_CAPABILITIES = {"type": "net"}


def blk() -> int:
    """``vdev-blk``."""
    return _backend("vdev-blk", "blk", BLK_CAPABILITIES, add_blk_arguments)


def net() -> int:
    """``vdev-net``."""
    return _backend("vdev-net", "net", NET_CAPABILITIES, add_net_arguments)


def _backend(
    program: str, kind: str, capabilities: dict[str, Any], add: Callable[[Parser], None]
) -> int:
    # "Other options and arguments should be ignored": also those that are wrong or missing.
    if "--print-capabilities" in sys.argv[1:]:
        print(json.dumps(capabilities))
        return EXIT_OK
    parser = Parser(
        prog=program, description=f"vhost-user back-end: vdev {kind} serve.", allow_abbrev=False
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print what this can do, as JSON"
    )
    add(parser)
    add_server_arguments(parser)
    parser.set_defaults(run=command("vdev.cli.serve", kind))
    return run(program, parser.parse_args)
