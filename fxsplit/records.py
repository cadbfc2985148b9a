"""Writes records as strict JSON and reads them back; all JSON is written here. Numbers that are not finite are null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from fxsplit.errors import nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Greater whole numbers are no floats.
MOST_FLOAT = 2**1023

Record = TypeVar("Record", bound="DataclassInstance")


def json_text(data: Any) -> str:
    """Write plain data as JSON for people to read: indented, and ending with a newline."""
    return json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"


def json_line(data: Any) -> str:
    """Write plain data as JSON in one line, without a newline."""
    return json.dumps(_finite(data), allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_record(kind: type[Record], data: Any) -> Record:
    """Make a record from plain data: the inverse of `dataclasses.asdict`, and of the JSON written of it.

    Fields may be bool, int, float, str, mappings, other records, tuples of these, or optional. Null in the place of a
    float stands for one that was not finite, and is read as NaN.

    Raises ValueError when a key is missing or unknown, or when a value has another type than its field.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} must be a mapping, not {type(data).__name__}")
    hints = get_type_hints(kind)
    if unknown := [str(key) for key in data if key not in hints]:
        raise ValueError(f"{kind.__name__} has no key {unknown[0]!r}{nearest(unknown[0], hints)}")
    for known in fields(kind):
        if known.name not in data and known.default is MISSING and known.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks the key {known.name!r}")
    values = {}
    for key, value in data.items():
        try:
            values[key] = _read(hints[key], value)
        except TypeError as error:
            raise ValueError(f"{key!r} of {kind.__name__} cannot be {value!r}") from error
    return kind(**values)


def _read(hint: Any, value: Any) -> Any:
    """Convert a value to the type of its field. Raises TypeError when it has another one."""
    members = get_args(hint)
    if NoneType in members:
        return None if value is None else _read(members[0], value)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_read(members[0], item) for item in value)
    kind = get_origin(hint) or hint
    if type(value) is int and kind is float and abs(value) > MOST_FLOAT:
        raise TypeError
    if kind is float:
        value = math.nan if value is None else float(value) if type(value) is int else value
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return read_record(kind, value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value
