"""Tables (of a TOML file, a control request, a snapshot) and option texts → configuration.

One decoder for all of them, driven by the dataclasses themselves: unknown keys are refused with the
nearest right one, types are not converted, and every mistake of a table gets its own line.  It
takes microseconds, so that starting a machine from a file is as quick as from options.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vdev.errors import UserError
from vdev.units import parse_size

T = TypeVar("T")

_WORDS = {
    str: 'text in quotes: "..."',
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def decode(cls: type[T], table: object, where: str, base: Path | None = None) -> T:
    """A `cls` (a dataclass) out of a table; relative paths are made to start at `base`.

    `where` stands before every complaint. Raises UserError.
    """
    mistakes: list[str] = []
    result = _decode(cls, table, where, base, mistakes)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return typing.cast(T, result)


def encode(config: Any) -> dict[str, Any]:
    """The table that `decode` makes the same configuration from; defaults are left out."""
    table: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value == spec.default:
            continue
        if isinstance(value, tuple):
            value = [encode(item) for item in value]
        elif dataclasses.is_dataclass(value):
            value = encode(value)
        table[_key(spec)] = value
    return table


def parse_options(cls: type[T], text: str, first: str | None, where: str) -> T:
    """A `cls` out of ``VALUE,key=value,flag``: see `option_table`."""
    return decode(cls, option_table(cls, text, first, where), where)


def option_table(cls: type[Any], text: str, first: str | None, where: str) -> dict[str, Any]:
    """The table of a `cls` that ``VALUE,key=value,flag`` says; a comma within a value is written
    twice.

    `first`: the field of a leading value without a key; ``ro`` is short for ``read_only``.
    Raises UserError.
    """
    table: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for number, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        key = "read_only" if key == "ro" else key
        if number == 0 and first is not None and not (equals and key == first):
            key, value = first, part
        elif not equals:
            if hints.get(key) is not bool:
                raise UserError(f"{where}{part!r}: write KEY=VALUE, with one of {_known(cls)}")
            value = "true"
        if key in table:
            raise UserError(f"{where}{key} is given twice")
        table[key] = _from_text(hints.get(key), value)
    return table


def _split(text: str) -> list[str]:
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _from_text(hint: Any, text: str) -> object:
    kinds = _kinds(hint)
    if bool in kinds:
        return {"true": True, "on": True, "false": False, "off": False}.get(text, text)
    if int in kinds and text.isdecimal() and text.isascii():
        return int(text)
    return text


def _decode(
    cls: type[Any], table: object, where: str, base: Path | None, mistakes: list[str]
) -> object:
    if not isinstance(table, Mapping):
        mistakes.append(f"{where}must be a table")
        return None
    before = len(mistakes)
    specs = {_key(spec): spec for spec in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        spec = specs.get(key)
        if spec is None:
            mistakes.append(f"{where}unknown key {key!r}{_nearest(str(key), list(specs))}")
            continue
        values[spec.name] = _value(spec, hints[spec.name], value, where, base, mistakes)
    for key, spec in specs.items():
        if spec.default is dataclasses.MISSING and spec.name not in values:
            mistakes.append(f"{where}{key} is missing")
    if len(mistakes) > before:
        return None
    try:
        return cls(**values)
    except UserError as error:
        mistakes.append(f"{where}{error}")
        return None


def _value(
    spec: dataclasses.Field[Any],
    hint: Any,
    value: object,
    where: str,
    base: Path | None,
    mistakes: list[str],
) -> object:
    key = _key(spec)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            mistakes.append(f"{where}{key} must be written [[{key}]]: one table a device")
            return ()
        return tuple(
            _decode(item, table, f"{where}[[{key}]] number {number}: ", base, mistakes)
            for number, table in enumerate(value, 1)
        )
    kinds = _kinds(hint)
    if dataclasses.is_dataclass(kinds[0]):
        if not isinstance(value, Mapping):
            mistakes.append(f"{where}{key} must be a table: [{key}]")
            return None
        inner = typing.cast(type[Any], kinds[0])
        return _decode(inner, value, f"{where}[{key}]: ", base, mistakes)
    if "size" in spec.metadata and isinstance(value, str):
        try:
            return parse_size(value)
        except UserError as error:
            mistakes.append(f"{where}{key}: {error}")
            return None
    if value is None and types.NoneType in kinds:
        return None
    if not _is_of(value, kinds):
        should = "a size like 512MiB or 2G" if "size" in spec.metadata else _WORDS[kinds[0]]
        mistakes.append(f"{where}{key} = {_show(value)}: must be {should}")
        return None
    if "path" in spec.metadata and base is not None and value and not _is_no_path(str(value)):
        return str(base / str(value))
    return value


def _is_no_path(text: str) -> bool:
    return text.startswith("null:")


def _is_of(value: object, kinds: list[Any]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))


def _kinds(hint: Any) -> list[Any]:
    """The types that a value may have, None last."""
    return list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]


def _key(spec: dataclasses.Field[Any]) -> str:
    return str(spec.metadata.get("table", spec.name))


def _known(cls: type[Any]) -> str:
    return ", ".join(_key(spec) for spec in dataclasses.fields(cls))


def _nearest(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
    return f": did you mean {near[0]}?" if near else f": {', '.join(known)} exist"


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
