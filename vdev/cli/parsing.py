"""What the parsers of all commands are made of."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
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
    """A parser whose complaints are one line."""

    def __init__(self, **options: Any) -> None:
        style = options.pop("formatter_class", argparse.HelpFormatter)
        super().__init__(**options, formatter_class=partial(style, width=_columns()))

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]
        self.exit(2, f"{program}: {message} (see {self.prog} --help)\n")


class LaterParser:
    """A command's parser, made when it is the command that is used: one of a dozen.

    fill: adds its arguments.
    """

    def __init__(self, *, fill: Fill, **options: Any) -> None:
        self._fill = fill
        self._options = options

    def parse_known_args(self, args: Any, namespace: Any) -> Any:
        """As argparse's."""
        parser = Parser(**self._options)
        self._fill(parser)
        return parser.parse_known_args(args, namespace)


def command(module: str, function: str, *, tls: bool = True) -> Callable[[argparse.Namespace], int]:
    """The function of a command, imported when it is called; tls: whether asyncio has it there."""

    def run(arguments: argparse.Namespace) -> int:
        if not tls:
            import_asyncio_without_tls()
        code: int = getattr(importlib.import_module(module), function)(arguments)
        return code

    return run


def import_asyncio_without_tls() -> None:
    """OpenSSL is a tenth of what a machine's start imports, and asyncio can do without: as in a
    Python that was built so, `ssl` cannot be imported meanwhile (sys.modules has None)."""
    missing: Any = None
    sys.modules["ssl"] = missing
    try:
        importlib.import_module("asyncio")
    finally:
        del sys.modules["ssl"]


def whole_number(text: str) -> int:
    """A decimal number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def add_loop_argument(parser: argparse.ArgumentParser, default: str = "uvloop") -> None:
    """Which event loop: uvloop's is quicker, asyncio's is there sooner."""
    parser.add_argument(
        "--loop",
        choices=("uvloop", "asyncio"),
        default=default,
        help=f"event loop (default: {default})",
    )
