"""Frozen dataclasses whose methods are written once.

`dataclasses` writes five methods for each frozen class and compiles them whenever its module is
imported: 0.8 ms a class, which a machine's dozen would add to every start.  A `Record` has fields
as a dataclass has, for `dataclasses.fields`, `replace` and `asdict`, and shares its methods.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """Subclasses declare their fields, whose defaults are values, and check them in
    `__post_init__`.  Equal are two of one class with equal fields.

    Raises TypeError for arguments that are not the fields.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    __match_args__: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__match_args__
        given = dict(zip(names, values, strict=False))
        needed = {spec.name for spec in fields(self) if spec.default is MISSING}
        wrong = sorted(named.keys() - (set(names) - given.keys()))
        lacking = sorted(needed - given.keys() - named.keys())
        if len(values) > len(names) or wrong or lacking:
            raise TypeError(
                f"{type(self).__name__}: {len(values)} values for {', '.join(names)}; "
                f"unknown or twice: {wrong}; lacking: {lacking}"
            )
        # What is not given is the class's.
        self.__dict__.update(given, **named)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Raises what the subclass says where the fields make no sense."""

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)
