"""Writes a graph of ops as the source code of a Python function. No name of the model stands in it as code.

    heads["global"](x) * 2  becomes  v1 = getattr(values, 'pop')()
                                     v2 = model._modules['heads']._modules['global'](v1); v1 = None  # 'heads.global'
                                     v3 = c0(v2, 2); v2 = None  # 'mul'

Variables and objects get generated names, and the model's names appear only as escaped strings. A module is looked up
at each call, so that the function serves any copy of the model and finds a module that was replaced.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import fx

from fxsplit.capture.contexts import Context, contexts_of

NAME = "stage"


def source_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """Write the source of a function `stage(model, values)`; return it with the objects that are to be its globals.

    A variable is set to None after its last use. An op runs in the contexts, such as autocast, that its node carries.
    """
    writer = _Writer(graph)
    writer.write()
    return "\n".join(writer.lines) + "\n", writer.objects


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        self.lines = [f"def {NAME}(model, values):"]
        self.objects: dict[str, Any] = {}
        self._nodes = list(graph.nodes)
        self._variables: dict[fx.Node, str] = {}
        self._names: dict[int, str] = {}

    def write(self) -> None:
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
                self._move_to(contexts_of(node), blocks)
            self.lines.append("    " * len(blocks) + self._statement(node, used_up[node]))

    def _move_to(self, contexts: tuple[Context, ...], blocks: list[tuple[Context, ...]]) -> None:
        """Close and open `with` blocks. A block that can stay open does: autocast caches converted weights in it."""
        while not _begins_with(contexts, blocks[-1]):
            blocks.pop()
        if further := contexts[len(blocks[-1]) :]:
            opened = ", ".join(f"{self._object(context)}.open()" for context in further)
            self.lines.append("    " * len(blocks) + f"with {opened}:")
            blocks.append(contexts)

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
            path, _, name = str(node.target).rpartition(".")
            return f"getattr({_module(path)}, {name!a})"
        arguments = [self._value(argument) for argument in node.args]
        if node.op == "call_module":
            called = _module(str(node.target))
        elif node.op == "call_method":
            called = f"getattr({arguments.pop(0)}, {str(node.target)!a})"
        else:
            called = self._object(node.target)
        if node.kwargs:
            arguments.append(f"**{self._value(node.kwargs)}")
        return f"{called}({', '.join(arguments)})"

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


def _module(path: str) -> str:
    return "model" + "".join(f"._modules[{part!a}]" for part in path.split(".") if path)


def _begins_with(contexts: tuple[Context, ...], first: tuple[Context, ...]) -> bool:
    """Tell whether contexts begin with the very same objects: a context that was closed and opened again is another."""
    return len(contexts) >= len(first) and all(one is other for one, other in zip(contexts, first, strict=False))
