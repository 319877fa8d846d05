"""Servers that are one program, which may lie elsewhere: ``--tool``, ``--server NAME=KNOWN:…``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from perf.model import Server
from perf.tools import find_tool, first_line


@dataclass
class Program(Server):
    """`program`: its name in perf/tools.py; `command`: what to run instead, if anything."""

    program: ClassVar[str]
    name: str
    command: Sequence[str] = field(default=(), kw_only=True)

    def with_command(self, name: str, command: Sequence[str]) -> Self:
        return replace(self, name=name, command=tuple(command))

    def start(self) -> list[str]:
        """The first words of its command line. Raises ToolMissing."""
        return [*(self.command or [find_tool(self.program)])]

    def version(self) -> str:
        return first_line(self.command or [self.program], "--version")
