"""Files that a person writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdev.errors import UserError


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError, which names the file and what is wrong."""
    import tomllib  # most machines are started without a file

    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
