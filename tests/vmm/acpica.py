"""ACPICA's compiler and interpreter, the reference for what our tables mean."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_NOTIFY = re.compile(r"Received a \w+ Notify on \[(\w+)\] 0x[0-9a-f]+ Value 0x([0-9A-F]+)")
_COMPLAINT = re.compile(r"error|warning|remark|exception|AE_[A-Z]|failure|invalid", re.IGNORECASE)
# Notifications come from threads of acpiexec's own, which waits for them after each command.
_SETTLE = [r"evaluate \_OS"] * 10


def _run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def compile_asl(folder: Path, source: str) -> bytes:
    """The table that iasl makes of `source`, byte by byte as written; any complaint fails."""
    (folder / "source.dsl").write_text(source)
    report = _run(folder, "iasl", "-oa", "-p", "compiled", "source.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in report, report
    return (folder / "compiled.aml").read_bytes()


def disassemble(folder: Path, table: bytes) -> str:
    """The source of a table; any complaint fails."""
    (folder / "table.dat").write_bytes(table)
    report = _run(folder, "iasl", "-p", "table", "-d", "table.dat")
    assert not _COMPLAINT.search(report), report
    source = (folder / "table.dsl").read_text()
    assert not re.search(r"\* (?:Warning|Error)|Checksum : .*should be|Invalid", source), source
    return source


class Machine:
    """Loads tables into acpiexec, whose regions are plain memory, and runs commands there."""

    def __init__(self, folder: Path, *tables: bytes) -> None:
        self._folder = folder
        self._files: list[str] = []
        for number, table in enumerate(tables):
            self._files.append(f"acpiexec{number}.aml")
            (folder / self._files[-1]).write_bytes(table)

    def run(self, *commands: str, fill: int = 0) -> str:
        """What the commands print; `fill` is in every byte of a region at first."""
        batch = ";".join(commands)
        command = ("acpiexec", "-r", "-fv", str(fill), "-b", batch, *self._files)
        report = _run(self._folder, *command)
        assert "No outstanding allocations" in report, report
        # The command "resources" also tries what no device of ours has.
        report = report.replace("Evaluating _SRS\nAcpiSetCurrentResources failed: AE_NOT_FOUND", "")
        assert not _COMPLAINT.search(report), report
        return report

    def notifications(self, *commands: str, fill: int = 0) -> list[tuple[str, int]]:
        """Who was notified of what; sorted, since threads print them."""
        found = _NOTIFY.findall(self.run(*commands, *_SETTLE, fill=fill))
        return sorted((name, int(value, 16)) for name, value in found)
