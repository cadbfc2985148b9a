"""Makes the rest of a forward, from one of its statements on, one op.

    def forward(self, x):                  def forward(self, x):
        h = self.a(x)                          h = self.a(x)
        if random() < 0.5:        (1) ──►      return operation(locals())     (2)
            return self.c(h)
        return self.c(self.b(h))           def rest(self, x=None, h=None):    (3)
                                               if random() < 0.5:
                                                   return self.c(h)
                                               return self.c(self.b(h))

(1) cannot be recorded, since it may go another way in each call. What comes before it can (2); the rest is one op (3).
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_OPERATION = "__operation__"


def calls_method(target: Any) -> bool:
    """Whether an op calls a method of the model, its first argument, or the rest of one."""
    return target is operator.call or isinstance(target, Rest)


class Rest:
    """An op that runs `forward`, a function of a model's class, from the statement `index` of its body on."""

    def __init__(self, forward: FunctionType, index: int) -> None:
        self.forward, self.index = forward, index
        self.__name__ = self.__qualname__ = "rest"

    @classmethod
    def after(cls, model: nn.Module, error: BaseException) -> Rest | None:
        """Find the rest of the model's forward, from the statement that raised `error` on.

        None if that is the first statement, or if the source does not show all that the forward does.
        """
        forward = type(model).forward
        if "forward" in vars(model) or not isinstance(forward, FunctionType):
            return None
        frames = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is forward.__code__]
        definition = _definition(forward)
        body = [] if definition is None else definition.body
        for index, statement in enumerate(body):
            if frames and index and statement.lineno <= frames[0] <= (statement.end_lineno or 0):
                own = forward.__code__.co_varnames[0]
                return cls(forward, index) if _is_divisible(model, own, body[:index], body[index:]) else None
        return None

    @property
    def line(self) -> int:
        """Return the line of the file at which it begins."""
        return self._definition.body[self.index].lineno

    def beginning(self, model: nn.Module, operation: Callable[[dict[str, Any]], Any]) -> MethodType:
        """Make a forward of `model` that ends with `operation`, called with the variables that the rest reads."""

        def call(variables: Mapping[str, Any]) -> Any:
            return operation({name: variables[name] for name in self._names if name in variables})

        return MethodType(self._function(self._codes[0], call), model)

    def __call__(self, forward: MethodType, variables: dict[str, Any]) -> Any:
        """Run it with these variables, for the model that the bound method `forward` belongs to."""
        return self._function(self._codes[1], None)(forward.__self__, **variables)

    def __deepcopy__(self, _: dict[int, Any]) -> Rest:
        # It holds nothing of a model, and the source may have been edited since.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Rest, (self.forward, self.index)

    @cached_property
    def _definition(self) -> ast.FunctionDef:
        definition = _definition(self.forward)
        assert definition is not None
        return definition

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """List the variables, except `self`, that it may read."""
        code = self.forward.__code__
        rest = self._definition.body[self.index :]
        used = {node.id for statement in rest for node in ast.walk(statement) if isinstance(node, ast.Name)}
        variables = dict.fromkeys(code.co_varnames + code.co_cellvars)
        return tuple(name for name in variables if name in used and name != code.co_varnames[0])

    @cached_property
    def _codes(self) -> tuple[CodeType, CodeType]:
        """Compile the beginning (2) and the rest (3), in a function whose variables are the forward's closure."""
        definition = self._definition
        own = definition.args.posonlyargs + definition.args.args
        inputs = _arguments((own[0].arg, *self._names))
        ending = ast.parse(f"return {_OPERATION}(locals())").body
        beginning = _without_defaults(definition.args), [*definition.body[: self.index], *ending]
        first, second = _compiled(self.forward, beginning, (inputs, definition.body[self.index :]))
        return first, second

    def _function(self, code: CodeType, operation: Any) -> FunctionType:
        """Make a function of one of the codes, with the globals and the closure of the forward."""
        cells = dict(zip(self.forward.__code__.co_freevars, self.forward.__closure__ or (), strict=True))
        cells[_OPERATION] = CellType(operation)
        defaults = self.forward.__defaults__ if code is self._codes[0] else (None,) * len(self._names)
        closure = tuple(cells[name] for name in code.co_freevars)
        function = FunctionType(code, self.forward.__globals__, "forward", defaults, closure)
        if code is self._codes[0]:
            function.__kwdefaults__ = self.forward.__kwdefaults__
        return function


def _arguments(names: Iterable[str]) -> ast.arguments:
    return ast.arguments(posonlyargs=[], args=[*map(ast.arg, names)], kwonlyargs=[], kw_defaults=[], defaults=[])


def _without_defaults(given: ast.arguments) -> ast.arguments:
    """List the same arguments; their defaults, which may be code, are those of the forward, worked out already."""
    made = _arguments(arg.arg for arg in given.posonlyargs + given.args)
    made.kwonlyargs = [ast.arg(arg.arg) for arg in given.kwonlyargs]
    made.kw_defaults = [None for _ in given.kwonlyargs]
    made.vararg = given.vararg and ast.arg(given.vararg.arg)
    made.kwarg = given.kwarg and ast.arg(given.kwarg.arg)
    return made


def _definition(forward: FunctionType) -> ast.FunctionDef | None:
    """Parse a function, with the lines of its file; None if its source is missing or does not show all that it does."""
    try:
        lines, first = inspect.getsourcelines(forward.__code__)
        # Not dedented, since that would change strings over several lines.
        tree = ast.parse("if 1:\n" + "".join(lines) if lines[0][:1].isspace() else "\n" + "".join(lines))
    except (OSError, SyntaxError):
        return None
    ast.increment_lineno(tree, first - 2)
    definition = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    if any(map(_depends_on_function, ast.walk(definition))):
        return None
    return definition if _is_source_of(forward) else None


def _compiled(forward: FunctionType, *functions: tuple[ast.arguments, list[ast.stmt]]) -> list[CodeType]:
    """Compile functions, in a function whose variables are the closure of `forward`."""
    outer = ast.FunctionDef(
        name="outer",
        args=_arguments((*forward.__code__.co_freevars, _OPERATION)),
        body=[ast.FunctionDef("forward", arguments, body, []) for arguments, body in functions],
        decorator_list=[],
    )
    tree = ast.fix_missing_locations(ast.Module([outer], []))
    code = compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True)
    (made,) = (each for each in code.co_consts if isinstance(each, CodeType))
    return [each for each in made.co_consts if isinstance(each, CodeType)]


def _is_source_of(forward: FunctionType) -> bool:
    """Whether the file of a function still says what it does: it may have been edited, or rewritten when imported."""
    code = forward.__code__
    if any(name.startswith("@py") for name in code.co_names + code.co_varnames):
        # pytest writes more into assertions, and changes nothing else.
        return True
    # All of the file, since code depends on what is imported around it.
    source = "".join(linecache.getlines(code.co_filename))
    try:
        file = compile(source, code.co_filename, "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return any(each == code for each in _codes_in(file))


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes_in(each)


def _depends_on_function(node: ast.AST) -> bool:
    """Whether a node means something else in another function: a generator, a name that its class changes."""
    name = getattr(node, "attr", getattr(node, "id", getattr(node, "arg", None)))
    private = isinstance(name, str) and name.startswith("__") and not name.endswith("__")
    return private or isinstance(node, ast.Yield | ast.YieldFrom | ast.Global | ast.Nonlocal)


def _is_divisible(model: nn.Module, own: str, before: Sequence[ast.stmt], after: Sequence[ast.stmt]) -> bool:
    """Whether the statements `before` act on those `after` them by variables alone. `own` is the variable of the model.

    They do not where they make functions, which would see later changes of the variables; where they give `own` another
    value; and where they read an attribute that those after them set for the next call.
    """
    nodes, later = ([node for statement in part for node in ast.walk(statement)] for part in (before, after))
    makes_functions = any(isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef) for node in nodes)
    renames = any(isinstance(node, ast.Name) and node.id == own and _is_set(node) for node in nodes)
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    kept = {node.attr for node in later if isinstance(node, ast.Attribute) and node.attr in read and _is_set(node)}
    # The tensors of a model are read anew in each call.
    return not (makes_functions or renames or any(not isinstance(getattr(model, name, None), Tensor) for name in kept))


def _is_set(node: ast.Name | ast.Attribute) -> bool:
    return not isinstance(node.ctx, ast.Load)
