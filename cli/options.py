"""Command-line options made from the fields of RunSpec."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args, get_type_hints

import typer
from rich.markup import escape

from fxsplit.presets import NO_PRESET, PRESETS
from fxsplit.spec import RunSpec

from . import completion

METAVARS = {bool: "", int: "INTEGER", float: "NUMBER", str: "TEXT"}
LIST_METAVARS = {float: "NUMBER,...", str: "PATH,..."}

Command = TypeVar("Command", bound=Callable[..., object])


def with_spec_options(names: Collection[str]) -> Callable[[Command], Command]:
    """Put options for these fields of RunSpec in place of the `**given` of a command; None is "not given".

    Beside `--preset` stands a flag for each preset.
    """
    hints = get_type_hints(RunSpec)
    made = [_preset_flag(name) for name in PRESETS if "preset" in names and name != NO_PRESET]
    made += [_parameter(item, hints[item.name]) for item in fields(RunSpec) if item.name in names]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(item: Field[Any], hint: Any) -> inspect.Parameter:
    kind = next((member for member in get_args(hint) if isinstance(member, type)), hint)
    is_list = isinstance(item.default, tuple)
    name = f"--{item.name.replace('_', '-')}"
    option = typer.Option(
        None,
        f"{name}/--no-{name[2:]}" if kind is bool else name,
        *item.metadata["flags"],
        help=_help(item),
        rich_help_panel=item.metadata["group"],
        metavar=LIST_METAVARS[kind] if is_list else METAVARS[kind],
        autocompletion=_completion(item),
    )
    # Text, for RunSpec to read: its errors say what is allowed.
    annotation = (bool if kind is bool else str) | None
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _completion(item: Field[Any]) -> Callable[[str], list[str]] | None:
    choices = item.metadata["choices"]
    return completion.data if item.name == "data" else completion.one_of(choices) if choices else None


def _preset_flag(name: str) -> inspect.Parameter:
    panel = next(item.metadata["group"] for item in fields(RunSpec) if item.name == "preset")
    option = typer.Option(
        None, f"--{name}", help=f"The same as --preset {name}.", rich_help_panel=panel, metavar=METAVARS[bool]
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool | None)


def _help(item: Field[Any]) -> str:
    """Write the help of an option, and its default: to typer the default of every option is "not given"."""
    notes = [", ".join(item.metadata["choices"])] if item.metadata["choices"] else []
    default = item.default
    if not (default is None or default is False or default == ()):
        notes.append(f"default: {default}")
    for name, setting in ((name, each) for name, settings in PRESETS.items() for each in settings):
        if setting.field == item.name:
            epochs = f" from {setting.from_epochs} epochs" if setting.from_epochs > 1 else ""
            notes.append(f"with --{name}{epochs}: {'on' if setting.value is True else setting.value}")
    text = escape(str(item.metadata["help"]))
    return f"{text} [dim]{escape('[' + '; '.join(notes) + ']')}[/dim]" if notes else text
