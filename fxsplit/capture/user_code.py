"""Finds the user's line that runs now, and reads from its source whether it only asserts something."""

from __future__ import annotations

import ast
import dis
import gc
import inspect
import linecache
import os
import sysconfig
import traceback
from collections.abc import Container
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import torch
from torch import nn

from fxsplit.meta import evaluate

_EVALUATION = evaluate.__file__
_OURS = [Path(__file__).parents[1] / folder for folder in ("capture", "meta", "objects")]
_NOT_THE_USERS = (*(f"{folder}{os.sep}" for folder in (*_OURS, Path(torch.__file__).parent)), "<")
_AROUND_FORWARD = tuple(str(Path(__file__).with_name(name)) for name in ("tracer.py", "recording.py"))
_COMPARISONS = {"IS_OP", "CONTAINS_OP", "COMPARE_OP"}
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))


def user_frame() -> FrameType | None:
    """Find the innermost frame that belongs neither to torch, what this package captures with nor Python's library."""
    frame = inspect.currentframe()
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


@cache
def _is_users(file: str) -> bool:
    if file.startswith(_NOT_THE_USERS):
        return False
    return not file.startswith(_LIBRARY) or file.startswith(_PACKAGES)


def user_line() -> str:
    """Name the line of `user_frame`, as `file.py:12`."""
    frame = user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "unknown"


def unseen_question(proxy_type: type) -> str | None:
    """Find a line, in a function of the user's that is running, that asks what no proxy can answer; None without one.

    Python compares identities and types by itself: `x.dtype is torch.float32`, `type(x) in (tuple, list)`, `x is y`.
    """
    frame = inspect.currentframe()
    while frame is not None and (comparisons := _comparisons_of_identity(frame.f_code)) is not None:
        for line, names in comparisons:
            if any(type(frame.f_locals.get(name)) is proxy_type for name in names):
                return f"{frame.f_code.co_filename}:{line}"
        frame = frame.f_back
    return None


@cache
def _comparisons_of_identity(code: CodeType) -> tuple[tuple[int, tuple[str, ...]], ...] | None:
    """List the lines of a user's function that compare identities or types, each with the variables that it reads.

    None for the function of the tracer that calls a forward.
    """
    if code.co_filename in _AROUND_FORWARD and code.co_name in ("_through", "_trace"):
        return None
    if not _is_users(code.co_filename):
        return ()
    found = []
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for index, step in enumerate(steps):
        asks_identity = step.opname == "IS_OP" and steps[index - 1].opname != "LOAD_CONST"
        after = {each.opname for each in steps[index + 1 : index + 9]}
        asks_type = step.opname == "LOAD_GLOBAL" and step.argval == "type" and not _COMPARISONS.isdisjoint(after)
        if asks_identity or asks_type:
            near = steps[max(0, index - 8) : index] if asks_identity else steps[index + 1 : index + 3]
            names = tuple(str(each.argval) for each in near if each.opname in ("LOAD_FAST", "LOAD_DEREF"))
            line = step.positions.lineno if step.positions else None
            found.append((line or code.co_firstlineno, names))
    return tuple(found)


def failing_function(error: BaseException, kept_whole: Container[object]) -> FunctionType | None:
    """Find the innermost function, or method of a module, that was running below a forward when it failed.

    Forwards do not count, nor functions in `kept_whole`; None if nothing else was running.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename == _EVALUATION:
            break
        if not _is_users(code.co_filename) or code.co_name == "forward":
            continue
        function = _function_of(frame)
        if function is not None and function not in kept_whole:
            found = function
    return found


def compiled_function(error: BaseException) -> FunctionType | None:
    """Find the function made by torch.compile that refused to be traced, if `error` says so."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    code = frames[-1].f_code
    if code.co_name != "compile_wrapper":
        return None
    inner = frames[-1].f_locals.get("fn")
    for found in gc.get_referrers(code):
        cells = found.__closure__ or () if isinstance(found, FunctionType) else ()
        if any(cell.cell_contents is inner for cell in cells):
            made: FunctionType = found
            return made
    return None


def _function_of(frame: FrameType) -> FunctionType | None:
    name, variables = frame.f_code.co_name, frame.f_code.co_varnames
    owner = frame.f_locals.get(variables[0]) if variables else None
    classes = type(owner).__mro__ if isinstance(owner, nn.Module) else ()
    for space in (frame.f_globals, *(vars(each) for each in classes)):
        function = space.get(name)
        # Of a decorated function what is called as a whole is the outermost.
        if isinstance(function, FunctionType) and getattr(inspect.unwrap(function), "__code__", None) is frame.f_code:
            return function
    return None


def asserted() -> bool | None:
    """Return the answer after which the model goes on, where `user_line` only asserts something; else None.

    assert mask.any()                       True
    if x.isnan().any(): raise ...           False
    if a.any() or not b.all(): raise ...    False for a.any(), True for b.all()
    """
    frame = user_frame()
    if frame is None:
        return None
    statements = [
        node
        for node in ast.walk(_parsed(frame.f_code.co_filename))
        if isinstance(node, ast.Assert | ast.If)
        and node.test.lineno <= frame.f_lineno <= (node.test.end_lineno or node.test.lineno)
    ]
    if not statements:
        return None
    statement = statements[-1]
    position = _position(frame)
    if isinstance(statement, ast.Assert):
        return _answer_for(statement.test, True, position)
    if _always_raises(statement.body):
        return _answer_for(statement.test, False, position)
    return None


def _position(frame: FrameType) -> tuple[int, int]:
    """Return line and column of the instruction before a jump, since the jump has those of the whole statement."""
    # An instruction takes two bytes, and `co_positions` has an entry for each instruction.
    line, _, column, _ = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2 - 1, None))
    return line or frame.f_lineno, column or 0


@lru_cache(maxsize=64)
def _parsed(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module([], [])


def _answer_for(test: ast.expr, wanted: bool, position: tuple[int, int]) -> bool | None:
    """Return what the operand at `position` must be for `test` to be `wanted`; None if that is uncertain."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answer_for(test.operand, not wanted, position)
    if not isinstance(test, ast.BoolOp):
        return wanted
    operand = next((operand for operand in test.values if _encloses(operand, position)), None)
    # `a or b` is false, and `a and b` true, only if both are. The opposite is certain only if the last operand decides.
    if operand is None or (isinstance(test.op, ast.And) is not wanted and operand is not test.values[-1]):
        return None
    return _answer_for(operand, wanted, position)


def _encloses(node: ast.expr, position: tuple[int, int]) -> bool:
    end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
    return (node.lineno, node.col_offset) <= position <= end


def _always_raises(body: list[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.Assert):
        return isinstance(last.test, ast.Constant) and not last.test.value
    call = last.value if isinstance(last, ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "_assert":
        return bool(call.args) and isinstance(call.args[0], ast.Constant) and not call.args[0].value
    return isinstance(last, ast.Raise)
