"""Damage: to a value, to the structure of plain data, to the bytes of a file."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

# Of every type, near the ends of every range, and of the kinds that other programs have stumbled on.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 10**6, 10**12, 10**13, -(10**20), 2**63, 10**300),
    *(0.0, -0.0, 0.5, 0.999, 1.0, 1.5, -1e-3, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "1e-3",
        "1e999",
        "nan",
        "on",
        "off",
        "yes",
        "none",
        "auto",
        "null",
        "~",
        "é",
        "🦊",
        "\u202e",
    ),
    *("\0", "a\0b", "a\nb", "\x1b]0;pwn\x07", "\ud800"),
    *("a" * 5000, "../../x", "/", "/proc/self/mem", ".", ".."),
    *("~nosuchuser/x", "~/x", "folder:", "folder:.", "folder:/dev"),
    *("folder:~nosuchuser/x", "no/such/file", "a" * 300),
    *(
        "9" * 5000,
        "1_000",
        "0x10",
        "1:30",
        "2020-13-45",
        "2020-01-01",
        "%s%n",
        "{0}",
        "[bold]",
        "<b>",
        "$(id)",
        ",",
        ",,",
    ),
    *("cuda:99", "cuda:99999999999999999999", "timm:resnet18"),
    *("hf:bert", "os:abort", "sys:exit", "nets.py:build"),
    *(
        [],
        [None],
        [[]],
        ["a"],
        ["a", "a"],
        [0],
        [1, 2, 3],
        [0.5] * 3,
        [""],
        ["\ud800"],
        ["x" * 500] * 50,
        list(range(3000)),
    ),
    *({}, {"a": 1}, {"": ""}, {"a": {"b": {"c": []}}}),
)
SNIPPETS = (
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"\r",
        b"\t",
        b"\n\n",
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
    ),
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!int ",
        b"!!python/object/apply:os.system [id]",
        b"!!binary ",
        b"!x ",
        b"!<tag:x> ",
        b"? ",
    ),
    *(
        b"[" * 50,
        b"{" * 50,
        b"- " * 3000,
        b"[" * 3000,
        b"9" * 5000,
        b"0x" + b"f" * 5000,
        b'"\\ud800"',
        b'"\\uD800\\uDC00"',
    ),
    *(
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"null",
        b"true",
        b'"',
        b"'",
        b"\\",
        b"|\n",
        b">\n",
        b"#",
        b"{}",
        b"[]",
        b",",
    ),
)


def word(draw: random.Random, known: Sequence[str]) -> str:
    """A name, near one that is known or not."""
    if draw.random() < 0.2:
        return "".join(draw.choices(string.printable, k=draw.randrange(12)))
    letters = list(draw.choice(known))
    for _ in range(draw.randrange(3)):
        place = draw.randrange(len(letters) + 1)
        letters[place : place + draw.randrange(2)] = draw.choices(string.ascii_lowercase + "-_. ", k=draw.randrange(3))
    return "".join(letters)


def value(draw: random.Random, good: Any, known: Sequence[str]) -> Any:
    """Another value in the place of a good one: hostile, misspelt, near, or of another shape."""
    kind = draw.randrange(6)
    if kind == 0 and isinstance(good, bool):
        return not good
    if kind == 0 and isinstance(good, int | float):
        return draw.choice((-good, good + 1, good * 10**6, good / 3, str(good), f"{good}x"))
    if kind == 0 and isinstance(good, str) and good:
        return word(draw, [good])
    if kind == 1:
        return word(draw, known)
    if kind == 2:
        return [deepcopy(good)] * draw.randrange(4)
    if kind == 3:
        return {str(draw.choice(known)): deepcopy(good)}
    return deepcopy(draw.choice(HOSTILE))


def structure(draw: random.Random, data: Any, known: Sequence[str]) -> Any:
    """Change one place, somewhere in plain data: a value, a key, an item that is doubled, moved or gone."""
    if isinstance(data, dict) and data and draw.random() < 0.9:
        name = draw.choice(list(data))
        kind = draw.randrange(10)
        if kind == 0:
            return {key: each for key, each in data.items() if key != name}
        if kind == 1:
            return {word(draw, [*known, str(name)]) if key == name else key: each for key, each in data.items()}
        if kind == 2:
            return {**data, word(draw, known): value(draw, data[name], known)}
        if kind < 6 or not isinstance(data[name], dict | list):
            return {**data, name: value(draw, data[name], known)}
        return {**data, name: structure(draw, data[name], known)}
    if isinstance(data, list) and data and draw.random() < 0.9:
        place = draw.randrange(len(data))
        kind = draw.randrange(6)
        if kind == 0:
            return data[:place] + data[place + 1 :]
        if kind == 1:
            return data[:place] + [data[place]] * 2 + data[place + 1 :]
        if kind == 2:
            return draw.sample(data, len(data))
        return [*data[:place], structure(draw, data[place], known), *data[place + 1 :]]
    return value(draw, data, known)


def damaged(draw: random.Random, data: bytes, times: int) -> bytes:
    """Change bytes: flipped, cut out, doubled, cut off, or something put between."""
    for _ in range(times):
        place, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 16, 64))
        kind = draw.randrange(6)
        if kind == 0:
            data = data[:place] + draw.randbytes(length) + data[place + length :]
        elif kind == 1:
            data = data[:place] + data[place + length :]
        elif kind == 2:
            data = data[:place] + data[place : place + length] * 2 + data[place + length :]
        elif kind == 3:
            data = data[: place or 1]
        elif kind == 4 and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        else:
            data = data[:place] + draw.choice(SNIPPETS) + data[place:]
    return data
