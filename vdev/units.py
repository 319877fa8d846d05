"""Sizes as people write them: ``64MiB``, ``10G``, ``512``."""

from __future__ import annotations

import re

from vdev.errors import UserError

_SIZE = re.compile(r"(\d+)\s*(?:([KMGTP])(?:i?B)?|B)?", re.IGNORECASE)
_DECIMAL = re.compile(r"\d+\s*[KMGTP]B", re.IGNORECASE)
_UNITS = "KMGTP"


def parse_size(text: str) -> int:
    """Bytes of ``text``: digits and, if wanted, one of K, M, G, T, P or KiB … PiB (powers of 1024).

    ``64MB`` is refused: half of the world's tools read it as 64 * 1000**2.
    """
    text = text.strip()
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"size {text!r} is not a number of bytes: write it like 512, 64MiB or 10G")
    if _DECIMAL.fullmatch(text):
        raise UserError(f"size {text!r} is ambiguous: write {text[:-1]} or {text[:-1]}iB (1024s)")
    number, unit = match.groups()
    return int(number) << (10 * (_UNITS.index(unit.upper()) + 1) if unit else 0)


def format_size(size: int) -> str:
    """``size`` bytes in the largest unit that leaves at most one decimal: ``64MiB``, ``1.5GiB``."""
    for power in range(len(_UNITS), 0, -1):
        whole = 1 << (10 * power)
        if size >= whole:
            return f"{size / whole:.1f}".removesuffix(".0") + _UNITS[power - 1] + "iB"
    return f"{size}B"
