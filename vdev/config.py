"""The configuration file of ``vdev serve``: what a person writes, checked as a whole.

Imported only there, since pydantic takes longer to import than everything else together.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vdev.errors import UserError
from vdev.toml import read_toml
from vdev.units import parse_size

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def _unicast_mac(text: str) -> str:
    if not _MAC.fullmatch(text):
        raise ValueError("must be six bytes like 52:54:00:12:34:56")
    if int(text[:2], 16) & 1:
        raise ValueError("is a multicast address: the lowest bit of the first byte must be 0")
    return text.lower()


def _interface_cidr(text: str) -> str:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError("must be an address with its prefix length, like 10.0.0.1/24") from None
    return text


def _image_name(text: str) -> str:
    if text.startswith("null:"):
        try:
            parse_size(text.removeprefix("null:"))
        except UserError as error:
            raise ValueError(f"is not null:SIZE: {error}") from None
    return text


def _serial(text: str) -> str:
    if len(text) > 20 or not text.isascii() or not text.isprintable():
        raise ValueError("must be at most 20 printable ASCII characters")
    return text


_Path = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BlkConfig(_Table):
    """One ``[[blk]]`` table: a block device on a socket."""

    socket: _Path
    image: Annotated[_Path, AfterValidator(_image_name)]
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    read_only: bool = False
    queues: int = Field(default=1, ge=1, le=256)
    serial: Annotated[str, AfterValidator(_serial)] | None = None
    cache: Literal["none", "writeback", "writethrough", "unsafe"] = "writeback"
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    lock: Literal["open", "running"] = "open"


class NetConfig(_Table):
    """One ``[[net]]`` table: a network device on a socket."""

    socket: _Path
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    tap: _Path | None = None
    bridge: _Path | None = None
    queues: int = Field(default=1, ge=1, le=128)
    mac: Annotated[str, AfterValidator(_unicast_mac)] | None = None
    mtu: int | None = Field(default=None, ge=68, le=65535)
    address: Annotated[str, AfterValidator(_interface_cidr)] | None = None

    @model_validator(mode="after")
    def _has_a_wire(self) -> NetConfig:
        if self.tap is None and self.bridge is None:
            raise ValueError("needs a tap, a bridge, or both")
        return self


class ServerConfig(_Table):
    """The ``[server]`` table: what all devices of the process share."""

    poll_us: int = Field(default=32, ge=0, le=1_000_000)
    iothreads: int = Field(default=1, ge=1, le=256)
    control: _Path | bool = True


class Config(_Table):
    """A whole configuration file; paths in it are relative to its directory."""

    server: ServerConfig = ServerConfig()
    blk: list[BlkConfig] = []
    net: list[NetConfig] = []

    @model_validator(mode="after")
    def _something_to_serve(self) -> Config:
        if not self.blk and not self.net:
            raise ValueError("has no device: add a [[blk]] or a [[net]] table")
        return self


def load_config(path: str) -> Config:
    """Read and check the configuration file ``path``.

    Raises UserError, with a line for each mistake that names file, table, key, value and what
    would be right.
    """
    try:
        config = Config.model_validate(read_toml(path))
    except ValidationError as error:
        raise UserError("\n".join(_lines(path, error))) from None
    return _anchored(config, path)


def _anchored(config: Config, path: str) -> Config:
    """With paths made absolute, and a name for each device; both may not occur twice."""
    base = Path(path).resolve().parent
    sockets: dict[str, str] = {}
    names: dict[str, str] = {}

    def anchor(kind: str, index: int, table: BlkConfig | NetConfig) -> dict[str, Any]:
        where = _table(kind, index)
        changes = {
            "socket": str(base / table.socket),
            "name": table.name or f"{kind}{index}",
        }
        for what, seen in (("socket", sockets), ("name", names)):
            first = seen.setdefault(changes[what], where)
            if first is not where:
                raise UserError(f"{path}: {where}: {what} = {changes[what]!r}: {first} has it too")
        return changes

    blk = []
    for index, disk in enumerate(config.blk):
        image = disk.image if disk.image.startswith("null:") else str(base / disk.image)
        blk.append(disk.model_copy(update={**anchor("blk", index, disk), "image": image}))
    net = [
        card.model_copy(update=anchor("net", index, card)) for index, card in enumerate(config.net)
    ]
    server = config.server
    if isinstance(server.control, str):
        server = server.model_copy(update={"control": str(base / server.control)})
    return config.model_copy(update={"blk": blk, "net": net, "server": server})


_MODELS: dict[str, type[_Table]] = {"blk": BlkConfig, "net": NetConfig, "server": ServerConfig}
_HEADINGS = {
    "blk": "written [[blk]]: one table a device",
    "net": "written [[net]]: one table a device",
    "server": "a table: [server]",
}


def _table(kind: str, index: int) -> str:
    return f"[[{kind}]] number {index + 1}"


def _lines(path: str, error: ValidationError) -> list[str]:
    """A line for each place that has a mistake; a union complains once for each of its parts."""
    lines: dict[tuple[str, str | None], str] = {}
    for detail in error.errors():
        lines.setdefault(_place(detail["loc"]), f"{path}: {_explain(detail)}")
    return list(lines.values())


def _explain(error: ErrorDetails) -> str:
    where, key = _place(error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        model = _MODELS[str(error["loc"][0])] if where else Config
        return f"{where}unknown key {key!r}{_nearest(str(key), model)}"
    if kind == "missing":
        return f"{where}{key} is missing"
    if not where and key in _MODELS:
        return f"{key} must be {_HEADINGS[key]}"
    if key is None:
        return f"{where}{_should_be(error)}"
    return f"{where}{key} = {_toml(error['input'])}: {_should_be(error)}"


def _place(loc: tuple[int | str, ...]) -> tuple[str, str | None]:
    """The table as the user wrote it, and the key."""
    match loc:
        case (str(kind), int(index), *rest) if kind in _MODELS:
            return f"{_table(kind, index)}: ", str(rest[0]) if rest else None
        case ("server", key, *_):
            return "[server]: ", str(key)
    return "", str(loc[0]) if loc else None


def _nearest(key: str, model: type[_Table]) -> str:
    known = list(model.model_fields)
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
    return f": did you mean {near[0]}?" if near else f": {', '.join(known)} exist"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 60 else text[:57] + "..."


_PLAIN = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "string_type": 'must be text in quotes: "..."',
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "may have letters, digits, '_', '.' and '-'",
    "model_type": "must be a table",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def _should_be(error: ErrorDetails) -> str:
    plain = _PLAIN.get(error["type"])
    return plain.format_map(error.get("ctx", {})) if plain else error["msg"]
