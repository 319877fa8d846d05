"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH_OF_A_PIPE = 160


def console_for() -> Console:
    """Standard output: as wide as the terminal, or wide enough where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_PIPE)
