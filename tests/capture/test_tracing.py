"""Capture: every op under the user's own names, in both modes, and the model left as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from fxsplit.capture.paper import NETWORKS
from fxsplit.capture.tracing import Trace, trace
from fxsplit.errors import GuardError, TraceError
from fxsplit.plan.cuts import cuts
from tests.models import HAZARDS, Average, BranchOnData, Chain, FunctionalDropout, Hooked, InnerBranchOnData, InPlace


def captured(model: nn.Module, size: int = 8) -> Trace:
    return trace(model, (torch.empty(2, 3, size, size, device="meta"),))


LARGE: dict[str, Callable[[], nn.Module]] = {
    "timm:resnext50_32x4d": lambda: timm.create_model("resnext50_32x4d"),
    "timm:densenet121": lambda: timm.create_model("densenet121"),
    "timm:vgg16": lambda: timm.create_model("vgg16"),
    "timm:vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224"),
    "torchvision:resnet18": lambda: torchvision.models.resnet18(),
    **{f"paper:{name}": make for name, make in NETWORKS.items()},
}


@pytest.mark.parametrize("name", LARGE)
def test_real_models_are_captured_at_full_depth_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = LARGE[name]()
    found = captured(model, 224 if "vit" in name else 32)
    assert not found.opaque
    leaves = {path for path, module in model.named_modules() if type(module).__module__.startswith("torch.nn.modules")}
    for graph in (found.train, found.eval):
        assert {op.path for op in graph.ops if op.kind == "module"} <= leaves
        used = {name for op in graph.ops for name in op.state}
        assert used >= {name for name, _ in model.named_parameters()}
        # A forward returns one value, made by the last op.
        assert graph.outputs == (graph.ops[-1].name,)
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [op.name for op in found.train.ops if op.name in convolutions] == [
        op.name for op in found.eval.ops if op.name in convolutions
    ]


def test_plain_torch_fx_fails_where_the_value_carrying_tracer_does_not() -> None:
    with torch.device("meta"):
        model = timm.create_model("vgg16")
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(model)
    assert len(captured(model, 32).train) > 30


def test_ops_are_in_order_under_the_users_names() -> None:
    found = captured(Chain())
    assert [op.name for op in found.train.ops] == [
        "conv1", "norm1", "relu", "conv2", "norm2", "relu_1", "mean", "head",
    ]  # fmt: skip
    assert [op.reads for op in found.train.ops] == [
        ("x",), ("conv1",), ("norm1",), ("relu",), ("conv2",), ("norm2",), ("relu_1",), ("mean",),
    ]  # fmt: skip
    assert found.train.ops[1].state == (
        "norm1.weight", "norm1.bias", "norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked",
    )  # fmt: skip
    assert set(found.train.ops[1].mutates) == {
        "norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked",
    }  # fmt: skip
    assert found.eval.ops[1].mutates == ()
    assert found.train.values["mean"].shape == (2, 6)
    assert found.train.values["conv1"].bytes_per_sample == 6 * 8 * 8 * 4


def test_functions_carry_the_path_of_the_module_around_them() -> None:
    with torch.device("meta"):
        found = captured(torchvision.models.resnet18(), 64)
    adds = [op.name for op in found.train.ops if "add" in op.name]
    assert adds == [f"layer{layer}.{block}:iadd" for layer in (1, 2, 3, 4) for block in (0, 1)]


def test_the_modes_differ_where_the_model_does() -> None:
    found = captured(FunctionalDropout())
    train, evaluation = ([op.name for op in graph.ops] for graph in (found.train, found.eval))
    assert train == [
        "conv1",
        "norm1",
        "relu",
        "dropout",
        "conv2",
        "norm2",
        "relu_1",
        "dropout_1",
        "mean",
        "head",
    ]
    assert evaluation == ["conv1", "norm1", "relu", "dropout", "conv2", "norm2", "relu_1", "mean", "head"]


@pytest.mark.parametrize("name", HAZARDS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = HAZARDS[name]()
    model.train()
    next(iter(model.children())).eval()

    def look() -> list[Any]:
        return [
            (path, module.training, sorted(vars(module)), len(module._forward_hooks), type(module).forward)
            for path, module in model.named_modules()
        ]

    before, weights = look(), {name: value.clone() for name, value in model.state_dict().items()}
    random_state, factories = (
        torch.get_rng_state(),
        (torch.zeros, torch.autograd.Function.apply, nn.Module.__call__),
    )
    captured(model)
    assert look() == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (torch.zeros, torch.autograd.Function.apply, nn.Module.__call__) == factories


def test_a_branch_on_data_at_the_top_is_refused_in_one_sentence_that_points_at_it() -> None:
    with pytest.raises(TraceError) as caught:
        captured(BranchOnData())
    assert caught.value.exit_code == 3
    message = str(caught.value)
    line = next(
        number
        for number, text in enumerate(Path("tests/models.py").read_text(encoding="utf-8").splitlines(), 1)
        if number > BranchOnData.forward.__code__.co_firstlineno and "if x.mean() > 0" in text
    )
    assert f"tests/models.py:{line} branches on data" in message
    assert "\n" not in message


def test_a_module_that_branches_on_data_stays_one_op_with_a_reason() -> None:
    found = captured(InnerBranchOnData())
    assert list(found.opaque) == ["gate"]
    assert "branches on data: it asks for bool() of a tensor" in found.opaque["gate"]
    gate = found.train.ops[found.train.find("gate")]
    assert (gate.kind, gate.output.shape) == ("module", (2, 6, 8, 8))
    assert [op.name for op in found.train.ops].count("relu") == 1
    assert found.programs[True].guards.questions == ()


def test_a_buffer_that_is_replaced_is_never_lost() -> None:
    found = captured(HAZARDS["AssignedBuffer"]())
    assert list(found.opaque) == ["average"]
    assert "in the place of its buffer 'mean'" in found.opaque["average"]
    with pytest.raises(TraceError, match="in the place of its buffer 'mean'"):
        trace(Average(), (torch.empty(2, 6, 4, 4),))


class Nest(nn.Module):
    """Neither it nor what is in it can be traced through: the outermost is told."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HAZARDS["InnerBranchOnData"]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else -y


def test_only_what_became_an_op_is_called_opaque() -> None:
    found = captured(nn.Sequential(Nest(), nn.Tanh()))
    assert [op.name for op in found.train.ops] == ["0", "1"]
    assert list(found.opaque) == ["0"]


def test_hooks_are_never_dropped() -> None:
    found = captured(Hooked())
    assert found.opaque == {"block": "it has hooks, which tracing through it would drop"}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_context: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x)  # type: ignore[no-any-return]


def test_a_custom_autograd_function_keeps_its_own_backward() -> None:
    found = captured(nn.Sequential(nn.Conv2d(3, 3, 1), Custom()))
    assert found.opaque == {"1": "it calls the custom autograd function Twice"}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_parametrized_module_stays_one_op() -> None:
    scaled = nn.utils.parametrize.register_parametrization(Scale(), "weight", nn.Softplus())
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)), scaled)
    assert [op.name for op in captured(model).train.ops] == ["0", "1"]


def test_modules_can_be_named_as_leaves() -> None:
    model = torchvision.models.resnet18()
    found = trace(model, (torch.empty(2, 3, 32, 32),), leaves=["layer1", torchvision.models.resnet.BasicBlock])
    assert [op.path for op in found.train.ops if op.path.startswith("layer")] == [
        "layer1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1",
    ]  # fmt: skip
    with pytest.raises(TraceError, match="no module 'layer9'"):
        trace(model, (torch.empty(2, 3, 32, 32),), leaves=["layer9"])


def test_ops_that_overwrite_are_known_and_cuts_before_them_refused() -> None:
    found = captured(InPlace())
    written = {op.name: op.mutates for op in found.train.ops if op.mutates and op.kind != "module"}
    assert written == {"iadd": ("norm2",), "relu": ("iadd",), "tanh_": ("conv2_1",)}
    refusals = {cut.path: cut.refusal for cut in cuts(found.train, found.eval)}
    assert refusals["act"] == "op 'act' writes in place into the value 'norm1' after it"
    assert refusals["conv2"] is None
    assert refusals["relu"] == "op 'relu' writes in place into the value 'iadd' after it"


def test_a_norm_entered_twice_cannot_be_cut_apart() -> None:
    found = captured(HAZARDS["NormTwice"]())
    refused = [cut.path for cut in cuts(found.train, found.eval) if cut.refusal and "norm1.running_mean" in cut.refusal]
    assert refused == ["relu", "conv2", "norm1_1"]


def test_multiply_adds_equal_those_worked_out_by_hand() -> None:
    macs = {op.name: op.macs for op in captured(Chain()).train.ops if op.macs}
    assert macs == {"conv1": 8 * 8 * 6 * 3 * 9, "conv2": 8 * 8 * 6 * 6 * 9, "head": 6 * 5}


@pytest.mark.parametrize("name", ["Chain", "InPlace", "FunctionalDropout", "TiedWeight"])
def test_activation_bytes_equal_what_autograd_really_keeps(name: str) -> None:
    model = HAZARDS[name]()
    images = torch.randn(4, 3, 8, 8)
    ignored = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    expected = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in ignored)
    found = trace(model, (images,))
    per_sample = sum(op.activation_bytes for op in found.train.ops)
    # Statistics of a batch are kept too: they do not grow with it, so that a share of a sample is rounded up.
    assert expected <= 4 * per_sample <= expected + 4 * len(found.train)


def test_costs_of_a_sample_do_not_depend_on_the_batch() -> None:
    small, large = (trace(Chain(), (torch.empty(n, 3, 8, 8),)).train for n in (2, 8))
    assert [op.macs for op in small.ops] == [op.macs for op in large.ops]
    assert (small.batch_size, large.batch_size) == (2, 8)


def test_device_contexts_work_after_the_first_trace_of_a_process() -> None:
    code = (
        "import torch; from fxsplit.capture.tracing import trace; trace(torch.nn.Linear(2, 2), (torch.empty(2, 2),))\n"
        "with torch.device('meta'): assert torch.empty(1).is_meta and torch.nn.Linear(2, 2).weight.is_meta"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Caller(nn.Module):
    def forward(self, batch: dict[str, Tensor], scale: float = 2.0, *, shift: Tensor | None = None) -> Any:
        out = batch["image"] * scale
        if shift is not None:
            out = out + shift
        return {"out": out, "pair": (batch["other"], None)}


def test_inputs_may_be_nested_named_and_defaulted() -> None:
    image, shift = torch.ones(2, 3), torch.ones(3)
    found = trace(Caller(), ({"image": image, "other": image},), {"shift": shift})
    assert [value.name for value in found.train.inputs] == ["batch.image", "batch.other", "shift"]
    assert [op.name for op in found.train.ops] == ["mul", "add"]
    assert set(found.train.outputs) == {"add", "batch.other"}


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-1] % 4 == 0, "the width must be a multiple of 4")
        return x + 1


def test_an_assertion_of_the_model_is_a_guard() -> None:
    found = captured(Asserting())
    assert [op.name for op in found.train.ops] == ["add"]
    found.programs[True].guards.check([torch.empty(1, 3, 2, 12)])
    with pytest.raises(GuardError, match=r"bool\(\) of 'eq' was True and is now False"):
        found.programs[True].guards.check([torch.empty(1, 3, 2, 6)])
    with pytest.raises(TraceError, match=r"in training: AssertionError: the width must be a multiple of 4$"):
        captured(Asserting(), 6)


def test_what_cannot_run_is_told_with_the_models_own_words() -> None:
    with pytest.raises(TraceError, match=r"Chain cannot be traced in training: .*Linear|size|shape|channels"):
        trace(Chain(), (torch.empty(2, 4, 8, 8),))
    with pytest.raises(TraceError, match="has no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(3)), (torch.empty(2, 3),))


def test_a_trace_can_be_made_of_a_copy() -> None:
    """Digests name the structure alone: not the weights, not the object."""
    model = Chain()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.head.weight)
    assert captured(model).train.digest() == captured(other).train.digest()
    assert captured(model).train.digest() != captured(FunctionalDropout()).train.digest()
