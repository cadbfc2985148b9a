"""The entry point: parse with typer, do what was asked, turn every error into a sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from inspect import cleandoc
from typing import Annotated

import typer

from fxsplit.errors import FxsplitError, Terminated, UsageError, shortened

from .commands.check import check
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.inspect import inspect
from .commands.job import Job
from .commands.predict import predict
from .commands.train import train
from .completion import join_words
from .terminal import say, write

OUT_OF_MEMORY = (
    "out of memory; use a smaller --batch-size, split each batch with --grad-accum-steps, "
    "or halve its activations with --amp"
)

app = typer.Typer(
    name="fxsplit",
    help="Partition any PyTorch model by its torch.fx graph, and train image classifiers layer to layer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, evaluate, predict, export, inspect, check):
    # A line break inside of a paragraph would stay one in the help, whatever the width of the terminal.
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs))(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # only here: it takes a while to import

        write(f"fxsplit {version('fxsplit')}\n")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True, metavar=""),
    ] = False,
) -> None:
    """Options of fxsplit itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit code."""
    verbose = runs = False
    join_words(os.environ)
    try:
        asked = app(arguments, prog_name="fxsplit", standalone_mode=False)
        if not isinstance(asked, Job):
            return int(asked or 0)
        verbose, runs = asked.verbose, True
        asked.run()
        sys.stdout.flush()
        return 0
    except FxsplitError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except Terminated as error:
        return _fail("; ".join(filter(None, ("terminated", str(error)))), 143)
    except KeyboardInterrupt as error:
        return _fail("; ".join(filter(None, ("interrupted", str(error)))), 130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(OUT_OF_MEMORY, 1)
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else "; run with -v for the traceback"
        return _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}", 1)
    except BaseException as error:
        if not runs:
            raise  # typer ends a process that was asked for completions
        # Such as SystemExit, which would end the process with what looks like success.
        return _fail(f"the model's code ended the run: it raised {type(error).__name__}; take that out", 1)


def _fail(message: str, exit_code: int) -> int:
    """Typer's errors have no message where help was shown instead."""
    if message:
        say(f"fxsplit: {shortened(message) if exit_code == UsageError.exit_code else message}")
    return exit_code


def _is_out_of_memory(error: Exception) -> bool:
    """Known by name and text: torch should not be imported for its class, and a CPU raises RuntimeError."""
    names = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in names or "you tried to allocate" in str(error)
