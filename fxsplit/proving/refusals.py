"""Checks of models that never raise: what is wrong with a model is said in its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from time import perf_counter
from typing import Concatenate, ParamSpec, TypeVar

from fxsplit.errors import FxsplitError, NoModelError
from fxsplit.models import registry
from fxsplit.report import CheckRecord, ForecastRecord

Options = ParamSpec("Options")
Record = TypeVar("Record", CheckRecord, ForecastRecord)
Check = Callable[Concatenate[str, Options], Record]


def never_raises(kind: type[Record]) -> Callable[[Check[Options, Record]], Check[Options, Record]]:
    """Decorate a check of a model by name: time it, and make an exception the `refusal` of a record of this kind."""

    def decorate(check: Check[Options, Record]) -> Check[Options, Record]:
        @wraps(check)
        def checked(spec: str, /, *args: Options.args, **options: Options.kwargs) -> Record:
            began = perf_counter()
            try:
                registry.expand(spec)  # a wildcard gets as far as this only if it means no model, which raises here
                record = check(spec, *args, **options)
            except FxsplitError as error:
                record = kind(model=spec, refusal=str(error), unknown=isinstance(error, NoModelError))
            except Exception as error:
                record = kind(model=spec, refusal=f"{type(error).__name__}: {' '.join(str(error).split())}")
            return replace(record, seconds=perf_counter() - began)

        return checked

    return decorate
