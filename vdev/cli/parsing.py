"""What the parsers of all commands are made of."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn

Fill = Callable[["Parser"], None]


@cache
def _columns() -> int:
    """As argparse has it, which asks again for every argument, by a module that takes long."""
    try:
        return int(os.environ["COLUMNS"]) - 2
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns - 2
    except OSError:
        return 78


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line.

    fill: adds its arguments when it parses some; of all commands one is used.
    """

    def __init__(self, *, fill: Fill | None = None, **options: Any) -> None:
        self._fill = fill
        style = options.pop("formatter_class", argparse.HelpFormatter)
        super().__init__(**options, formatter_class=partial(style, width=_columns()))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As it is, with all arguments there."""
        if self._fill is not None:
            self._fill(self)
            self._fill = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]
        self.exit(2, f"{program}: {message} (see {self.prog} --help)\n")


def command(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """The function of a command, imported when it is called."""

    def run(arguments: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(arguments)
        return code

    return run


def whole_number(text: str) -> int:
    """A decimal number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def add_loop_argument(parser: argparse.ArgumentParser) -> None:
    """Which event loop."""
    parser.add_argument(
        "--loop",
        choices=("uvloop", "asyncio"),
        default="uvloop",
        help="event loop; asyncio is for debugging vdev itself",
    )
