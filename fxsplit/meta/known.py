"""Computes tensors whose numbers follow from sizes alone, such as a mask of ones, so that a model may branch on them.

    torch.ones(x.shape[:2])  ──►  mask.all()  ──►  `if`:  answered from real numbers, and checked in each run

While a model is traced no tensor has numbers, so these are computed on the CPU when the model asks for one.
"""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx

from fxsplit.meta.evaluate import Outside, resolve, storage_key
from fxsplit.objects.structure import tensors_in

MADE_OF_SIZES = frozenset((torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros))
LARGEST_BYTES = 2**28


def is_known(node: fx.Node, value: Any) -> bool:
    """Whether the numbers of a newly recorded node follow from sizes; `value` is its result on the meta device."""
    if node.meta["stand_in"] or node.meta["drawn"] or isinstance(node.target, Outside):
        return False
    tensors = tensors_in(value)
    if not tensors:
        return True
    if node.meta["written"] or sum(tensor.nbytes for tensor in tensors) > LARGEST_BYTES:
        return False
    inputs = node.all_input_nodes
    if not all(each.meta.get("known", False) for each in inputs):
        return False
    if node.target in MADE_OF_SIZES:
        return True
    is_op = node.op == "call_method" or isinstance(node.target, BuiltinFunctionType)
    of_tensors = any(tensors_in(each.meta["value"]) for each in inputs)
    return is_op and of_tensors and "empty" not in str(node.target)


def numbers_of(node: fx.Node) -> Tensor | None:
    """Compute the tensor of a node; None if its numbers do not follow from sizes, or if something wrote into it."""
    if not node.meta.get("known", False):
        return None
    written = {
        storage_key(tensor)
        for each in node.graph.nodes
        for target in each.meta.get("written", ())
        if isinstance(target, fx.Node)
        for tensor in tensors_in(target.meta["value"])
    }
    try:
        found = _computed(node, written, {})
    except Exception:
        return None
    return found if isinstance(found, Tensor) else None


def _computed(node: fx.Node, written: set[int], found: dict[fx.Node, Any]) -> Any:
    tensors = tensors_in(node.meta["value"])
    if not tensors:
        return node.meta["value"]
    if node in found:
        return found[node]
    if written.intersection(map(storage_key, tensors)):
        raise ValueError("a tensor that is written into has other numbers later")

    def real(leaf: Any) -> Any:
        leaf = _computed(leaf, written, found) if isinstance(leaf, fx.Node) else leaf
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    args, kwargs = resolve((node.args, node.kwargs), real)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    before = torch.get_rng_state()
    with torch.no_grad():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            value = node.target(*args, **kwargs)
    if not torch.equal(torch.get_rng_state(), before):
        torch.set_rng_state(before)
        raise ValueError("it draws random numbers")
    found[node] = value
    return value
