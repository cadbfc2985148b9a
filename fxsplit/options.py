"""Options as fields of a dataclass: their help, what is allowed, and the strict reading of values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import field
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from fxsplit.errors import nearest, shown
from fxsplit.plain_data import is_text

# The greatest whole number: more than anything can count, and fewer than 64 bits.
MOST = 10**12


class Kind(NamedTuple):
    """The type of an option, without None; whether None is allowed too; and words that stand beside other values."""

    type: Any
    optional: bool
    words: tuple[str, ...] = ()


def option(
    group: str,
    text: str,
    default: Any,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    instead: Mapping[str, str] | None = None,
    pattern: str | None = None,
    words: str | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """Make a field of a dataclass that is an option.

    Args:
        group: the heading under which its help stands.
        text: its help. With a `pattern` it also serves as the list of what is allowed, unless there are `words`.
        default: its value if it is not given.
        flags: further names on the command line.
        choices: the words that are allowed.
        instead: by words that may be taken for a choice, what to ask for instead.
        pattern: regular expression that the whole text must match.
        words: what is allowed, for errors.
        least: the least number allowed.
        above: numbers must be greater.
        below: numbers must be less.
        most: the greatest number allowed.
    """
    metadata: dict[str, Any] = {"group": group, "help": text, "flags": flags, "choices": choices, "pattern": pattern}
    metadata |= {"words": words, "least": least, "above": above, "below": below, "most": most, "instead": instead or {}}
    return field(default=default, metadata=metadata)


def key(name: str) -> str:
    """Turn the name of a field into the key of a recipe: `batch_size` into `batch-size`."""
    return name.replace("_", "-")


def kind_of(hint: Any) -> Kind:
    """Find the kind of an option from its annotation."""
    members = get_args(hint)
    words = tuple(word for member in members if get_origin(member) is Literal for word in get_args(member))
    return Kind(members[0], True, words) if NoneType in members else Kind(hint, False)


def read_value(name: str, value: object, kind: Kind, rule: Mapping[str, Any]) -> Any:
    """Read the value of the option `name`, whose metadata are `rule`.

    Raises ValueError, with a sentence for the user, when it has another type or is not one that the option allows.
    """
    given = value
    if kind.type is str and (rule["choices"] or rule["pattern"]) and isinstance(value, int):
        given = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)  # as YAML reads such words
    if isinstance(given, str) and given in kind.words:
        return given
    try:
        read = None if given is None and kind.optional else _READERS[kind.type][0](given)
        if read is None or _is_allowed(read, rule):
            return read
    except (TypeError, ValueError, OverflowError):
        pass
    texts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, str) and not is_text(text) for text in texts):
        raise ValueError(f"{key(name)} is {shown(value)}, which holds a character that no path and no file can have")
    beyond = isinstance(value, int) and abs(value) > MOST and rule["most"] is None
    hint = f"; the greatest number is {MOST}" if beyond else ""
    if isinstance(value, str):
        hint = f"; {rule['instead'][value]}" if value in rule["instead"] else nearest(value, rule["choices"])
    raise ValueError(f"{key(name)} is {shown(value)}, but must be {_allowed(kind, rule)}{hint}")


def _is_allowed(value: Any, rule: Mapping[str, Any]) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return (
        (not rule["choices"] or value in rule["choices"])
        and (rule["pattern"] is None or re.fullmatch(rule["pattern"], value) is not None)
        and (rule["least"] is None or all(number >= rule["least"] for number in numbers))
        and (rule["above"] is None or all(number > rule["above"] for number in numbers))
        and (rule["below"] is None or all(number < rule["below"] for number in numbers))
        and (rule["most"] is None or all(number <= rule["most"] for number in numbers))
    )


def _allowed(kind: Kind, rule: Mapping[str, Any]) -> str:
    if rule["choices"]:
        return f"one of {', '.join(rule['choices'])}"
    if rule["words"] is not None:
        return str(rule["words"])
    if rule["pattern"] is not None:
        return str(rule["help"]).rstrip(".")
    words = (("least", "at least"), ("above", "above"), ("below", "below"), ("most", "at most"))
    limits = [f"{word} {rule[limit]}" for limit, word in words if rule[limit] is not None]
    return " or ".join((f"{_READERS[kind.type][1]} {' and '.join(limits)}".rstrip(), *kind.words))


def _read_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MOST:
        raise TypeError
    return value


def _read_number(value: object) -> float:
    """Read a number, also from text: YAML reads 1e-3, which has no point, as text."""
    if not isinstance(value, int | float | str) or isinstance(value, bool) or not math.isfinite(float(value)):
        raise TypeError
    return float(value)


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value or not is_text(value):
        raise TypeError
    return value


def _read_path(value: object) -> str:
    """Read a module path, also from a number: layers of an nn.Sequential are called 0, 1, 2."""
    return str(_read_whole(value)) if isinstance(value, int) else _read_text(value)


def _read_list(value: object, read_item: Callable[[object], Any]) -> tuple[Any, ...]:
    """Read a list, a single item, or text with commas."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    return tuple(read_item(item) for item in (value if isinstance(value, list | tuple) else [value]))


_READERS: dict[Any, tuple[Callable[[object], Any], str]] = {
    bool: (_read_flag, "true or false"),
    int: (_read_whole, "a whole number"),
    float: (_read_number, "a number"),
    str: (_read_text, "text"),
    tuple[float, ...]: (lambda value: _read_list(value, _read_number), "numbers"),
    tuple[str, ...]: (lambda value: _read_list(value, _read_path), "module paths"),
}
