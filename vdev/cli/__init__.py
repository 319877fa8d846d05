"""The command line: arguments in, one function called, its errors in one place.

No module of vdev that serves anything is imported before the arguments are known to be right, and
each command imports what it alone needs: `vdev blk serve` must be quick to answer.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_GC_THRESHOLD = 50_000


def main(argv: Sequence[str] | None = None) -> int:
    """``vdev``: run the command in ``argv`` and return the exit code."""
    from vdev.cli.parser import vdev_parser

    return run("vdev", lambda: vdev_parser().parse_args(argv))


def run(program: str, parse: Callable[[], Namespace]) -> int:
    """Parse, run the command that was chosen, and turn its errors into lines and exit codes."""
    from vdev.errors import UserError

    # Nothing that imports leave behind is garbage: looking for it takes 3 % of a start.
    gc.set_threshold(_GC_THRESHOLD)
    try:
        try:
            arguments = parse()
            code: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader of our output has gone; the interpreter's own flush must not find the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code
