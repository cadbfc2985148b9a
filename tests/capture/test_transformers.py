"""Models of transformers as people call them: labels, caches, checkpoints, masks, outputs of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsplit.capture.tracing import trace
from tests.exact import Linears, assert_exact, executor_of, rows

transformers = pytest.importorskip("transformers", reason="transformers, the extra fxsplit[hf], is not installed")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(0))


def bert_with_classes() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.rand(2, 2)])
def test_a_classifier_finds_out_from_its_labels_what_its_problem_is(labels: Tensor) -> None:
    model = bert_with_classes()
    found = assert_exact(model, input_ids=tokens(2, 8), labels=labels)
    assert not found.opaque


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_is_traced_through(reentrant: bool) -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids = tokens(2, 8)
    found = assert_exact(model, input_ids=ids, labels=ids)
    assert not found.opaque


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_bart_whose_inputs_are_made_to_want_gradients() -> None:
    """transformers does so by hooks on embeddings, among them one that lends its weight and is never called."""
    sizes = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.BartConfig(vocab_size=50, max_position_embeddings=32, **sizes, **widths)
    model = transformers.BartForConditionalGeneration(config).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert model.model.shared._forward_hooks
    ids = tokens(2, 8)
    found = assert_exact(model, input_ids=ids, labels=ids)
    assert list(found.opaque) == ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]


@pytest.mark.parametrize(
    "asked",
    [{"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}],
    ids=lambda asked: next(iter(asked)),
)
def test_all_kinds_of_outputs(asked: dict[str, bool]) -> None:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    assert_exact(llama(), input_ids=tokens(2, 8), attention_mask=mask, **asked)


def filled_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Fills in an argument by its name, as transformers' decorators do, and looks for another one by its position."""

    @wraps(forward)
    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, args[0] * 2, **kwargs | {"factor": kwargs.get("factor") or 3})

    return around


class Decorated(Linears):
    @filled_in
    def forward(self, x: Any, mask: Any = None, factor: int | None = None) -> Any:
        return super().forward(x * factor if mask is None else x * factor * mask)


def test_a_decorator_gets_the_arguments_as_they_were_given() -> None:
    assert_exact(Decorated(), rows())
    assert_exact(Decorated(), rows(), mask=torch.rand(4, 6), factor=2)


def test_the_batch_size_is_free_where_an_output_has_a_class_of_its_own() -> None:
    class Output(dict[str, Any]):
        pass

    class Reshapes(Linears):
        def forward(self, x: Any) -> Any:
            return Output(logits=super().forward(x).reshape(len(x), -1))

    model: nn.Module = Reshapes()
    net = executor_of(trace(model, (rows(4),)))
    assert torch.equal(net(rows(7))["logits"], model(rows(7))["logits"])
