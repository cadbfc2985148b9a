"""Capture: every op under the user's own names, in both modes, and the model left as it was."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxsplit.capture.tracing import Trace, trace
from fxsplit.errors import GuardError, TraceError
from fxsplit.models.libraries.paper import NETWORKS
from fxsplit.objects.structure import members
from fxsplit.plan.cuts import cuts
from fxsplit.plan.schedule import Phase
from tests import networks
from tests.exact import assert_exact, executor_of
from tests.networks import HAZARDS, BranchOnData, Chain, FunctionalDropout, Hooked, InnerBranchOnData, InPlace


def captured(model: nn.Module, size: int = 8) -> Trace:
    return trace(model, (torch.empty(2, 3, size, size, device="meta"),))


def test_a_trace_is_printed_with_a_line_for_each_op() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)).flatten(1)

    assert str(captured(Net())).splitlines() == [
        "conv     module    2 × 4 × 6 × 6",
        "relu     function  2 × 4 × 6 × 6",
        "flatten  method    2 × 144",
    ]


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
        for number, text in enumerate(Path("tests/networks.py").read_text(encoding="utf-8").splitlines(), 1)
        if number > BranchOnData.forward.__code__.co_firstlineno and "if x.mean() > 0" in text
    )
    assert f"tests/networks.py:{line} branches on data" in message
    assert "\n" not in message


def test_a_module_that_branches_on_data_stays_one_op_with_a_reason() -> None:
    found = captured(InnerBranchOnData())
    assert list(found.opaque) == ["gate"]
    assert "branches on data: it asks for bool() of a tensor" in found.opaque["gate"]
    gate = found.train.ops[found.train.find("gate")]
    assert (gate.kind, gate.output.shape) == ("module", (2, 6, 8, 8))
    assert [op.name for op in found.train.ops].count("relu") == 1
    assert found.programs[True].guards.questions == ()


def test_a_buffer_that_is_replaced_is_an_op_that_writes_it() -> None:
    found = captured(HAZARDS["AssignedBuffer"]())
    assert not found.opaque
    assert [(op.name, op.mutates) for op in found.train.ops if op.kind == "function" and op.mutates] == [
        ("average:setitem", ("average.mean",))
    ]
    assert "average:setitem" not in found.eval.values


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
    assert found.opaque == {"block": "it has hooks, which tracing through it would drop; take them off to see inside"}


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
    refusals = {cut.path: cut.refusal for cut in cuts(found)}
    assert refusals["act"] == "op 'act' writes in place into the value 'norm1' after it"
    assert refusals["conv2"] is None
    assert refusals["relu"] == "op 'relu' writes in place into the value 'iadd' after it"


def test_norms_that_take_statistics_of_their_batch_mix_samples() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tracked, self.untracked = nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
            self.instance, self.group = nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)
            self.whole = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("variance", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.whole(self.group(self.instance(self.untracked(self.tracked(x)))))
            x = F.batch_norm(x, self.mean, self.variance)
            return F.batch_norm(F.instance_norm(x), self.mean, self.variance, training=self.training)

    found = trace(Norms(), (torch.randn(4, 3, 8, 8),), leaves=["whole"])
    mixing = [[op.name for op in graph.ops if op.mixes_samples] for graph in (found.train, found.eval)]
    assert mixing == [["tracked", "untracked", "whole", "batch_norm_1"], ["untracked"]]


def test_ops_along_the_samples_of_a_batch_mix_them() -> None:
    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(dim=(2, 3), keepdim=True)
            x = x.flatten(1)
            x = x * self.weight.mean()
            x = torch.maximum(x, x.amax(-1, keepdim=True)).softmax(1)
            x = x - x.mean(0)
            x = x / torch.std(x, dim=-2) + x.sum()
            x = F.normalize(x.flip((1,))) + F.normalize(x, dim=0)
            return x.roll(1, 0) + torch.max(x, x.relu())

    found = trace(Along(), (torch.randn(4, 3, 8, 8),))
    mixing = [op.name for op in found.train.ops if op.mixes_samples]
    assert mixing == ["mean_2", "std", "sum", "normalize_1", "roll"]
    # Batch 4 is also the length of a parameter; 5 is not.
    assert [op.mixes_samples for op in trace(Along(), (torch.randn(5, 3, 8, 8),)).train.ops] == [
        op.mixes_samples for op in found.train.ops
    ]


def test_a_norm_entered_twice_cannot_be_cut_apart() -> None:
    found = captured(HAZARDS["NormTwice"]())
    refused = [cut.path for cut in cuts(found) if cut.refusal and "norm1.running_mean" in cut.refusal]
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


def test_nothing_of_a_trace_outlives_it() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    model, images = Chain(), torch.rand(2, 3, 8, 8)
    trace(model, (images,))
    before = tensors()
    trace(model, (images,))
    assert tensors() == before
    assert gc.isenabled()


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


def test_the_batch_size_stays_free_where_python_asked_for_it() -> None:
    found = captured(HAZARDS["BatchSizeInPython"]())
    assert all(program.guards.questions == () for program in found.programs.values())
    assert [op.name for op in found.train.ops if op.name in ("len", "mul", "floordiv")] == ["len", "floordiv", "mul"]


class SizesOfBothKinds(nn.Module):
    """The batch size may vary, the height may not."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1) if x.shape[2] > 4 else x.flatten(1)
        return x / len(x)


def test_only_the_guards_of_the_batch_size_go() -> None:
    guards = captured(SizesOfBothKinds()).programs[True].guards
    assert [question.question for question in guards.questions] == ["bool"]
    guards.check([torch.empty(5, 3, 8, 8)])
    with pytest.raises(GuardError, match=r"bool\(\) of 'gt' was True and is now False"):
        guards.check([torch.empty(5, 3, 4, 8)])


class HalfTheSquare(nn.Module):
    """A number that equals the batch size when that is 2, and only then."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() * (len(x) * len(x) // 2)


class Unrolled(nn.Module):
    """A loop over the samples: another batch size is another network."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[index].relu() for index in range(len(x))])


class Threshold(nn.Module):
    """Another way for large batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).relu() if len(x) < 1000 else x.reshape(len(x), -1).tanh()


@pytest.mark.parametrize("kind", [Unrolled, Threshold, HalfTheSquare])
def test_a_batch_size_that_changes_the_path_is_a_guard(kind: type[nn.Module]) -> None:
    guards = captured(kind()).programs[True].guards
    guards.check([torch.empty(2, 3, 8, 8)])
    with pytest.raises(GuardError, match=r"len\(\) of 'x' was 2 and is now 3 \(.*test_tracing.py:\d+\)"):
        guards.check([torch.empty(3, 3, 8, 8)])


def test_the_first_answer_that_differs_is_told_even_if_the_model_then_fails() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(2, 3, int(x.shape[2]), 8)
            return x if int(x.shape[2]) > 4 else -x

    guards = captured(Strict()).programs[True].guards
    with pytest.raises(GuardError, match=r"int\(\) of .* was 8 and is now 4"):
        guards.check([torch.empty(2, 3, 4, 8)])


def test_methods_and_functions_that_depend_on_data_are_ops_with_reasons() -> None:
    method = captured(HAZARDS["MethodOnData"]())
    assert list(method.opaque) == ["pick"]
    assert "tests/networks.py" in method.opaque["pick"]
    pick = next(op for op in method.train.ops if op.name == ":pick" or op.name == "pick")
    assert set(pick.state) >= {"norm2.weight", "norm2.running_mean"}
    function = captured(HAZARDS["FunctionOnData"]())
    assert list(function.opaque) == ["tests.networks.largest"]
    assert "reads data: it calls item() of a tensor" in function.opaque["tests.networks.largest"]
    assert len(function.train) == len(captured(Chain()).train)


class Above(nn.Module):
    """How many rows come out depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.mean((1, 2, 3)) > 0]


class Inspects(nn.Module):
    """Asks for the sizes of what a module delivers, inside and at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.above = Above()
        self.rest = Longer()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.above(x))


class Longer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[0] > 1 else x.tanh()


class InspectsAtTheTop(Inspects):
    def forward(self, x: Tensor) -> Tensor:
        x = self.above(x)
        return x.relu() if x.shape[0] == 0 else x.tanh()


def test_a_size_that_depends_on_data_is_never_relied_upon() -> None:
    found = captured(Inspects())
    assert list(found.opaque) == ["above", "rest"]
    assert "asks for bool() of a size that may depend on data" in found.opaque["rest"]
    # At the top no module could stay whole: the answer is made sure of in every run.
    top = captured(InspectsAtTheTop())
    assert list(top.opaque) == ["above"]
    assert "expect" in top.train.values


def test_functions_and_methods_can_be_named_as_leaves() -> None:
    model = HAZARDS["MethodOnData"]()
    assert trace(model, (torch.empty(2, 3, 8, 8),), leaves=[type(model).pick]).opaque == {}
    found = trace(HAZARDS["FunctionOnData"](), (torch.empty(2, 3, 8, 8),), leaves=[networks.largest])
    assert found.opaque == {}
    assert "largest" in [op.name for op in found.train.ops]


def test_assertions_about_data_are_ops() -> None:
    found = captured(HAZARDS["AssertsOnData"]())
    assert not found.opaque
    assert [op.name for op in found.train.ops if "expect" in op.name] == ["expect", "expect_1", "expect_2", "expect_3"]


def test_a_module_that_does_something_else_each_time_stays_one_op() -> None:
    found = captured(HAZARDS["CountsCalls"]())
    assert found.opaque == {"counter": "its forward changes 'calls' in it, and would take another way the next time"}


class GivesUpLate(nn.Module):
    """A module in it replaces a buffer before it turns out that it cannot be traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.average = nn.Conv2d(3, 6, 1), networks.Average()

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.conv(x))
        return x.relu() if x.sum() > 0 else x


class TriesAgain(GivesUpLate):
    """The same, and then a function of its own reads data."""

    def forward(self, x: Tensor) -> Tensor:
        return networks.largest(self.average(self.conv(x)))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(GivesUpLate()), TriesAgain, HAZARDS["OtherTensors"]])
def test_nothing_of_an_attempt_stays_behind(make: Callable[[], nn.Module]) -> None:
    for program in captured(make()).programs.values():
        assert not list(members([vars(module) for module in program.guards.meta_model.modules()], fx.Proxy, set()))


class KeepsFirst(nn.Module):
    """Python asks whether something was kept, of which no proxy hears."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach()
        return x + self.first


def test_a_model_that_takes_another_way_the_next_time_is_refused() -> None:
    with pytest.raises(TraceError, match="its forward changes 'first' in it, and would take another way the next time"):
        captured(KeepsFirst())
    assert list(captured(nn.Sequential(KeepsFirst(), nn.Tanh())).opaque) == ["0"]


def test_cuts_lie_past_an_auxiliary_head() -> None:
    found = captured(HAZARDS["AuxiliaryHead"]())
    allowed = {cut.path for cut in cuts(found) if cut.refusal is None}
    assert {"auxiliary", "norm2", "tanh", "head"} <= allowed
    refused = {cut.path: cut.refusal for cut in cuts(found) if cut.refusal}
    assert "exists only in training" in refused["auxiliary.1"]


def test_what_only_evaluation_needs_is_no_hindrance() -> None:
    found = captured(HAZARDS["OnlyInEvaluation"]())
    assert "softmax" in found.eval.values
    assert "softmax" not in found.train.values
    assert all(cut.refusal is None for cut in cuts(found))


def test_ops_of_the_two_modes_are_matched_by_what_they_do() -> None:
    found = captured(HAZARDS["StochasticDepth"]())
    assert [op.name for op in found.eval.ops] == [op.name for op in found.train.ops if op.name in found.eval.values]
    assert {"add", "relu_1", "mean"} <= found.train.values.keys() & found.eval.values.keys()


def test_compiled_and_scripted_modules_stay_one_op() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()))
    compiled = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())
    compiled.compile(backend="eager")
    wrapped = torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()), backend="eager")
    found = captured(nn.Sequential(scripted, compiled, wrapped))
    assert [op.name for op in found.train.ops] == ["0", "1", "2"]
    assert ["scripted" in found.opaque["0"], *("compiled" in found.opaque[path] for path in ("1", "2"))] == [True] * 3
    with pytest.raises(TraceError, match="it is compiled; trace before"):
        captured(torch.compile(Chain(), backend="eager"))  # type: ignore[arg-type]


def test_a_power_with_a_plain_exponent_does_not_reach_foreign_memory() -> None:
    """torch's C code believes a `__class__`, and then reads the proxy as if it were a tensor."""
    assert "pow" in [op.name for op in captured(HAZARDS["NumbersOfTypes"]()).train.ops]


def test_factories_still_obey_a_device_context_after_tracing() -> None:
    script = (
        "import torch, fxsplit; from torch import nn\n"
        "fxsplit.trace(nn.ReLU(), (torch.empty(2, 3),))\n"
        "with torch.device('meta'): assert torch.zeros(2).device.type == 'meta'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tracing_first_leaves_compiling_intact() -> None:
    script = (
        "import torch, fxsplit\n"
        "conv, x = torch.nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)\n"
        "fxsplit.trace(conv, (x,))\n"
        "double = torch.compile(lambda number: number * conv.stride[0], backend='eager')\n"
        "assert torch.equal(double(x), x)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_dropout_is_known_where_it_drops() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.none = nn.Dropout(0.5), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.none(F.dropout(x, 0.5, self.training)))

    captured = trace(Drops(), (torch.ones(2, 3),))
    assert [op.is_dropout for op in captured.train.ops] == [True, False, True]
    assert not captured.eval.ops[-1].is_dropout


class Masks(nn.Module):
    """Makes a mask from the size of its input, and takes another way where it hides nothing."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.linear = make, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        mask = self.make(x)
        return self.linear(x) if mask.all() else self.linear(x) * mask


@pytest.mark.parametrize("make", [lambda x: torch.ones(x.shape) == 1, lambda x: torch.arange(x.shape[1]) > 1])
def test_a_branch_on_numbers_that_follow_from_sizes_is_taken_and_made_sure_of(
    make: Callable[[Tensor], Tensor],
) -> None:
    model = Masks(make)
    net = executor_of(trace(model, (torch.rand(2, 4),)))
    for x in (torch.rand(2, 4), torch.rand(5, 4)):
        assert torch.equal(net(x), model(x))


def _written(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape)
    mask[0] = 0
    return mask


@pytest.mark.parametrize("make", [_written, lambda x: torch.rand(x.shape) > 0.5, lambda x: x > 0])
def test_a_branch_on_numbers_that_are_written_drawn_or_given_is_not_taken_for_granted(
    make: Callable[[Tensor], Tensor],
) -> None:
    found = assert_exact(Masks(make), torch.rand(2, 4))
    assert [reason for reason in found.opaque.values() if "branches on data" in reason]


@pytest.mark.parametrize(
    ("in_training", "in_evaluation"),
    [
        (lambda x: x.ndim, lambda x: x.itemsize),
        (lambda x: x.shape[0], lambda x: x.shape[1]),
        (lambda x: x.size(0), lambda x: x.size(1)),
    ],
    ids=["name", "item", "argument"],
)
def test_numbers_of_one_mode_are_not_those_of_the_other(
    in_training: Callable[[Tensor], int], in_evaluation: Callable[[Tensor], int]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            number = (in_training if self.training else in_evaluation)(x)
            return self.second(x) * number

    found = trace(Model(), (torch.ones(4, 6),))
    refusals = {cut.path: cut.refusal for cut in cuts(found)}
    assert "exists only in" in str(refusals["second"])


def test_sums_of_products_are_told_apart_by_what_is_multiplied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            noisy = x + 0.1 * torch.randn_like(x) if self.training else x
            return self.linear(noisy + 0.5 * x)

    found = trace(Model(), (torch.ones(4, 6),))
    (product, total, _) = (op.name for op in found.eval.ops)
    by_name = {op.name: op for op in found.train.ops}
    assert by_name[product].reads == ("x",)
    assert product in by_name[total].reads


def test_a_module_that_returns_another_number_in_evaluation_stays_one_op() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x), {"scale": 2.0 if self.training else 3.0, "kind": "scaled"}

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Any:
            return self.scaled(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = Around(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            x, more = self.first(x)
            return self.head(x) * more["scale"]

    model = Model()
    found = assert_exact(model, torch.randn(4, 6))
    assert list(found.opaque) == ["first.scaled"]
    net = executor_of(found)
    net.enter(Phase(start=1, stop=2, epochs=1))
    net.train()
    model.first.eval()
    x = torch.randn(4, 6)
    assert torch.equal(net(x), model.head(model.first(x)[0]) * 3.0)
