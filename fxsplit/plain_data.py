"""Reads YAML and JSON that a stranger may have written: plain values, each said once, and not too many of them.

What a parser would make of tags, aliases or a number of 5,000 digits is refused before anything is made of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from fxsplit.errors import UsageError, reason, shown, shown_path

# A recipe with every key has 2 kB; a plan with the figures of 1,000 partitions has less than 1 MB.
MOST_RECIPE_BYTES, MOST_PLAN_BYTES = 1 << 17, 1 << 24
DEEPEST = 16
# Python reads longer numbers slowly, or not at all.
MOST_DIGITS = 400
TIMESTAMP = "tag:yaml.org,2002:timestamp"


def read_yaml(path: str | Path, noun: str) -> Any:
    """Read a YAML file of plain values. `noun` is what errors call it, such as "recipe".

    Dates are text, as are all words that only look like a type. Raises UsageError when the file cannot be read, is too
    large, is not YAML, or holds tags, aliases, keys given twice or deep nesting.
    """
    text = _text(path, noun, MOST_RECIPE_BYTES)
    try:
        data = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}" if mark else ""
        why = getattr(error, "plain_reason", None)
        raise UsageError(
            f"the {noun} {shown_path(path)} is not valid YAML{where}{f': {why}' if why else ''}"
        ) from error
    _refuse_unusual(data, path, noun)
    return data


def read_json(path: str | Path, noun: str) -> Any:
    """Read a JSON file, as `parse_json` does. Raises UsageError as that does, and when the file cannot be read."""
    return parse_json(_text(path, noun, MOST_PLAN_BYTES), origin=str(path), noun=noun)


def parse_json(text: str, *, origin: str, noun: str) -> Any:
    """Parse JSON. `noun` is what errors call it, and `origin` its name.

    Raises UsageError when the text is not JSON, or holds keys given twice, deep nesting, or numbers that JSON has not.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"the {noun} {shown_path(origin)} is not valid JSON near line {error.lineno}: {error.msg}"
        ) from error
    except ValueError as error:
        raise UsageError(f"the {noun} {shown_path(origin)} cannot be used: {reason(error)}") from error
    except RecursionError as error:
        raise UsageError(f"the {noun} {shown_path(origin)} is nested too deeply for a {noun}") from error
    _refuse_unusual(data, origin, noun)
    return data


def _text(path: str | Path, noun: str, most_bytes: int) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ValueError(f"it has more than {most_bytes >> 10} kB, too much for a {noun}")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the {noun} {shown_path(path)} cannot be read: it is no text in UTF-8") from error
    except OSError as error:
        raise UsageError(f"the {noun} {shown_path(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:  # such as a null character in the path
        raise UsageError(f"the {noun} {shown_path(path)} cannot be read: {reason(error)}") from error


def _refuse_unusual(data: Any, path: str | Path, noun: str) -> None:
    """Raise UsageError when plain data are nested too deeply, or hold text that cannot be written again."""
    level = [data]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not is_text(value):
                raise UsageError(f"the {noun} {shown_path(path)} holds {shown(value)}, which is no text in UTF-8")
        level = inner
    if level:
        raise UsageError(f"the {noun} {shown_path(path)} is nested too deeply for a {noun}")


def is_text(value: str) -> bool:
    """Tell whether text can be written in UTF-8 and be part of a path: it holds no surrogates and no null."""
    return not re.search("[\ud800-\udfff\0]", value)


class _PlainError(yaml.MarkedYAMLError):
    """Says in our words what a file may not hold."""

    def __init__(self, plain_reason: str, mark: Any) -> None:
        super().__init__(problem=plain_reason, problem_mark=mark)
        self.plain_reason = plain_reason


class _PlainLoader(yaml.SafeLoader):
    """Makes plain values of YAML: no aliases, which could stand for gigabytes, no tags, no key twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # the stubs do not know it is the class's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _PlainError(f"write out what {shown(f'*{event.anchor}')} stands for", event.start_mark)
        if tag := getattr(event, "tag", None):
            raise _PlainError(f"leave out the tag {shown(tag)}", event.start_mark)
        if self._depth == DEEPEST:
            raise _PlainError("it is nested too deeply", event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value if _is_scalar(key))
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise _PlainError(f"the key {shown(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise _PlainError(f"a number of {len(node.value)} digits is too long", node.start_mark)
        return super().construct_yaml_int(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is too long")
    return int(digits)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
