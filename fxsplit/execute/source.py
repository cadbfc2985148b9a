"""Writes a graph of ops as the source code of a Python function. No name of the model stands in it as code.

    heads["global"](x) * 2  becomes  def bind(find, place):
                                         m0 = find('heads')._modules
                                         def stage(values):
                                             v1 = values.pop()
                                             v2 = m0['global'](v1); v1 = None  # 'heads.global'
                                             v3 = c0(v2, 2); v2 = None  # 'mul'

Variables and objects get generated names, and the model's names appear only as escaped strings. `bind` finds where the
model keeps what is used, once for many calls: the dict that holds a module or a tensor. What lies there is taken at
each call, so that one that was replaced is found. A function to be compiled finds everything itself:

                                     def stage(model, values):
                                         v2 = model._modules['heads']._modules['global'](v1)
"""

from __future__ import annotations

import keyword
import math
from collections import defaultdict
from typing import Any

from torch import fx

from fxsplit.capture.contexts import Context, contexts_of

BIND, STAGE = "bind", "stage"


def source_of(graph: fx.Graph, *, bound: bool) -> tuple[str, dict[str, Any]]:
    """Write the source of a function; return it with the objects that are to be its globals.

    A variable is set to None after its last use. An op runs in the contexts, such as autocast, that its node carries.

    Args:
        graph: of a stage.
        bound: write `bind(find, place)`, which makes a function `stage(values)` for one model: `find` is given the path
            of a module and returns it, `place` is given a module and a name and returns the dict that has this
            attribute. Otherwise write `stage(model, values)`, which looks everything up in each call.
    """
    writer = _Bound(graph) if bound else _Writer(graph)
    return "\n".join(writer.lines()) + "\n", writer.objects


class _Writer:
    """Writes `stage(model, values)`."""

    def __init__(self, graph: fx.Graph) -> None:
        self.objects: dict[str, Any] = {}
        self._nodes = list(graph.nodes)
        self._variables: dict[fx.Node, str] = {}
        self._names: dict[int, str] = {}

    def lines(self) -> list[str]:
        return [f"def {STAGE}(model, values):", *self._body()]

    def _body(self) -> list[str]:
        lines = []
        last_use = {read: node for node in self._nodes for read in node.all_input_nodes}
        used_up: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for read, node in last_use.items():
            used_up[node].append(read)
        # For each open `with` block around the next line, outermost first: all contexts that are open in it.
        blocks: list[tuple[Context, ...]] = [()]
        for node in self._nodes:
            if node.op == "placeholder":
                self._variables[node] = "values"
                continue
            # A node that is no op of the model, such as reading a weight, stays in the block where it happens to be.
            if "op" in node.meta or node.op == "output":
                lines += self._move_to(contexts_of(node), blocks)
            lines.append("    " * len(blocks) + self._statement(node, used_up[node]))
        return lines

    def _move_to(self, contexts: tuple[Context, ...], blocks: list[tuple[Context, ...]]) -> list[str]:
        """Close and open `with` blocks, in lines that are returned.

        A block that can stay open does: autocast caches converted weights in it.
        """
        while not _begins_with(contexts, blocks[-1]):
            blocks.pop()
        if further := contexts[len(blocks[-1]) :]:
            opened = ", ".join(f"{self._object(context)}.open()" for context in further)
            blocks.append(contexts)
            return ["    " * (len(blocks) - 1) + f"with {opened}:"]
        return []

    def _statement(self, node: fx.Node, used_up: list[fx.Node]) -> str:
        if node.op == "output":
            return f"return {self._value(node.args[0])}"
        statement = self._call(node)
        if node.users:
            self._variables[node] = f"v{len(self._variables)}"
            statement = f"{self._variables[node]} = {statement}"
        if emptied := [self._variables[read] for read in used_up if read.op != "placeholder"]:
            statement += f"; {' = '.join(emptied)} = None"
        return f"{statement}  # {node.meta['op'].name!a}" if "op" in node.meta else statement

    def _call(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._attribute(*_divided(str(node.target)))
        arguments = [self._value(argument) for argument in node.args]
        if node.op == "call_module":
            called = self._module(str(node.target))
        elif node.op == "call_method":
            called = _method(arguments.pop(0), str(node.target), is_variable=isinstance(node.args[0], fx.Node))
        else:
            called = self._object(node.target)
        if all(map(_is_plain, node.kwargs)):
            arguments += [f"{name}={self._value(value)}" for name, value in node.kwargs.items()]
        else:
            arguments.append(f"**{self._value(node.kwargs)}")
        return f"{called}({', '.join(arguments)})"

    def _module(self, path: str) -> str:
        return "model" + "".join(f"._modules[{part!a}]" for part in path.split(".") if path)

    def _attribute(self, path: str, name: str) -> str:
        return f"getattr({self._module(path)}, {name!a})"

    def _value(self, argument: Any) -> str:
        kind = type(argument)
        if isinstance(argument, fx.Node):
            return self._variables[argument]
        if argument is None or kind in (bool, int) or (kind is float and math.isfinite(argument)):
            return repr(argument)
        if kind is str:
            return ascii(argument)
        if kind is slice:
            return f"slice({self._value(argument.start)}, {self._value(argument.stop)}, {self._value(argument.step)})"
        if isinstance(argument, list):
            return f"[{', '.join(map(self._value, argument))}]"
        if isinstance(argument, dict):
            return f"{{{', '.join(f'{self._value(key)}: {self._value(item)}' for key, item in argument.items())}}}"
        if isinstance(argument, tuple):
            items = "".join(f"{self._value(item)}, " for item in argument)
            if kind is tuple:
                return f"({items})"
            return f"{self._object(kind)}({items if hasattr(kind, '_fields') else f'({items})'})"
        return self._object(argument)

    def _object(self, value: Any) -> str:
        name = self._names.setdefault(id(value), f"c{len(self._names)}")
        self.objects[name] = value
        return name


class _Bound(_Writer):
    """Writes `bind(find, place)`, which makes `stage(values)`."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        # What is found once, by the code that finds it.
        self._found: dict[str, str] = {}

    def lines(self) -> list[str]:
        body = [f"    {line}" for line in self._body()]
        found = [f"    {name} = {code}" for code, name in self._found.items()]
        return [f"def {BIND}(find, place):", *found, f"    def {STAGE}(values):", *body, f"    return {STAGE}"]

    def _module(self, path: str) -> str:
        parent, name = _divided(path)
        return f"{self._once(f'find({parent!a})._modules')}[{name!a}]"

    def _attribute(self, path: str, name: str) -> str:
        module = self._once(f"find({path!a})")
        place = self._once(f"place({module}, {name!a})")
        # It leaves its place when it is parametrized or pruned.
        return f"{place}[{name!a}] if {name!a} in {place} else getattr({module}, {name!a})"

    def _once(self, code: str) -> str:
        return self._found.setdefault(code, f"m{len(self._found)}")


def _divided(path: str) -> tuple[str, str]:
    """Divide a path into that of the module which holds it, and its name there."""
    parent, _, name = path.rpartition(".")
    return parent, name


def _method(value: str, name: str, *, is_variable: bool) -> str:
    return f"{value}.{name}" if is_variable and _is_plain(name) else f"getattr({value}, {name!a})"


def _is_plain(name: str) -> bool:
    """Tell whether a name can stand in code as it is; Python would change an identifier that is not ASCII."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _begins_with(contexts: tuple[Context, ...], first: tuple[Context, ...]) -> bool:
    """Tell whether contexts begin with the very same objects: a context that was closed and opened again is another."""
    return len(contexts) >= len(first) and all(one is other for one, other in zip(contexts, first, strict=False))
