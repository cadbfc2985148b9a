"""Builds models of Hugging Face's transformers: `hf:TYPE` in a small size and offline, `hf:ORG/NAME` or `hf:./FOLDER`
as its config.json says.

A model gets the first of these heads that its type has: image classification, sequence-to-sequence, masked or causal
language modelling. Types that have only other heads cannot be built.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsplit.errors import NoModelError, UsageError, nearest
from fxsplit.models.downloads import hub_or_its_cache
from fxsplit.models.libraries.library import (
    DROP_PATH,
    HUB_CACHE,
    USUAL_SIZE,
    Library,
    errors_of,
    no_drop_path,
    refuse_pretrained,
)
from fxsplit.models.surgery import keep_small_images
from fxsplit.trust import code_is_trusted

# Limits of a small configuration, by the names that most types use for a size. None is replaced by the limit.
# A head of 64 channels fits the rotary embeddings of all types.
AT_MOST = {
    1: ("n_group", "topk_group"),
    2: ("num_experts_per_tok", "moe_topk"),
    4: (
        *("num_hidden_layers", "num_layers", "n_layers"),
        *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
        *("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        *("num_encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"),
    ),
    64: ("head_dim", "d_kv"),
    224: ("image_size",),
    256: (
        *("hidden_size", "d_model", "embedding_size", "entity_emb_size", "d_latents"),
        *("vocab_size", "vocab_size_per_layer_input"),
    ),
    512: (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"),
        *("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "max_position_embeddings"),
    ),
}
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

# Further settings without which the small configuration of a type is inconsistent.
ALSO: dict[str, dict[str, Any]] = {
    "esm": {"token_dropout": False},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_shape": [4, 4]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}

# The types left out of `hf:*`, and why (tried with transformers 5.24).
UNFIT = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it reads the states of another model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "its language head belongs to a part of it"),
    **dict.fromkeys(("blt", "dots3_note", "nemo_speechlm"), "the sizes of its parts depend on each other"),
    **dict.fromkeys(("cohere_compass_text", "dbrx"), "its default configuration lacks the rotary embedding"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "its default configuration lacks sizes"),
    "dinat": "it needs the library natten",
    "shieldgemma2": "it classifies pairs of image and text",
    "siglip2": "it takes patches, not images",
    "voxtral_realtime": "it takes sound beside text",
}


# The factories for heads, and transformers' names of the mappings from types to their classes; the first has priority.
FACTORIES = {
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}


def _names() -> list[str]:
    """List all types that `hf:TYPE` builds."""
    return sorted(kind for kind in _heads() if kind not in UNFIT)


def _build(
    name: str, *, num_classes: int, img_size: int | None, pretrained: bool, stem: str, drop_path: float
) -> nn.Module:
    """Build the model `hf:name`; without an `img_size` it is that of the configuration, as for pretrained weights."""
    if not _is_repository(name):
        refuse_pretrained(f"hf:{name}", pretrained)
    if drop_path:
        raise no_drop_path(f"hf:{name}", DROP_PATH)
    settings = {"num_classes": num_classes, "img_size": img_size}
    with errors_of("hf", name, settings, cache=HUB_CACHE), _download(name):
        model = _with_head(name, num_classes=num_classes, img_size=img_size, pretrained=pretrained)
    if stem == "cifar":
        keep_small_images(model, f"hf:{name}")
    return model


def _rebuild(name: str, **settings: Any) -> nn.Module:
    """Build a model as for pretrained weights: their image size is that of the configuration."""
    return _build(name, **settings | {"img_size": None, "pretrained": False})


def _native_size(name: str) -> int:
    with errors_of("hf", name, {}, cache=HUB_CACHE), _download(name):
        size = getattr(_configuration(name), "image_size", None)
    return (size[0] if isinstance(size, list | tuple) else size) or USUAL_SIZE


def _download(name: str) -> AbstractContextManager[None]:
    """Return a context in which transformers finds out soon that there is no network, where it needs one."""
    is_local = name.startswith((".", "/")) or Path(name).is_dir()
    return hub_or_its_cache() if _is_repository(name) and not is_local else nullcontext()


def _with_head(name: str, *, num_classes: int, img_size: int | None, pretrained: bool) -> nn.Module:
    config = _configuration(name)
    import transformers

    # Code that comes with a model says for which factories it has a class.
    own = [factory for factory in FACTORIES if factory in (getattr(config, "auto_map", None) or {})]
    if config.model_type in _heads():
        factory, architecture = _heads()[config.model_type]
        # transformers looks for the class of a type with several of them here
        config.architectures = [architecture]
    elif own and code_is_trusted():
        factory = own[0]
    else:
        raise UsageError(f"'hf:{name}' is a {config.model_type!r}, which has no head for image classes or language")
    auto = getattr(transformers, factory)
    config.num_labels = num_classes
    for each in (config, config.get_text_config()):
        each.use_cache = False
    if pretrained:
        model, found = auto.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=code_is_trusted(),
        )
        _clear_new_heads(model, found, num_classes)
    else:
        if img_size is not None and hasattr(config, "image_size"):
            config.image_size = img_size if isinstance(config.image_size, int) else [img_size, img_size]
        model = auto.from_config(config, trust_remote_code=code_is_trusted())
    assert isinstance(model, nn.Module)
    return model


@torch.no_grad()
def _clear_new_heads(model: nn.Module, found: Mapping[str, Any], num_classes: int) -> None:
    """Let heads that the weights lack, or have for other classes, start at zero, as `surgery.clear_classifier` does."""
    other = {each if isinstance(each, str) else each[0] for each in found.get("mismatched_keys", ())}
    for name in other | set(found.get("missing_keys", ())):
        parameter = model.get_parameter(name)
        if parameter.dim() and parameter.shape[0] == num_classes:
            parameter.zero_()


def _is_repository(name: str) -> bool:
    """Whether `name` is a repository on the hub or a folder, and not a type of model."""
    return "/" in name


def _heads() -> dict[str, tuple[str, str]]:
    """Map each type to the factory for its head, and to the class that the factory makes."""
    try:
        from transformers.models.auto import modeling_auto as auto
    except ModuleNotFoundError as error:
        raise UsageError(
            "'hf:' models are those of transformers, which is not installed; run pip install 'fxsplit[hf]'"
        ) from error
    # Of a type that has several heads the first factory counts, so that comes last.
    return {
        kind: (factory, made if isinstance(made, str) else made[0])
        for factory, mapping in reversed(FACTORIES.items())
        for kind, made in getattr(auto, mapping).items()
    }


def _configuration(name: str) -> Any:
    heads = _heads()
    import transformers

    if _is_repository(name):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=code_is_trusted())
    if name in UNFIT:
        raise UsageError(
            f"'hf:{name}' cannot be built small and offline: {UNFIT[name]}; give a repository of that type"
        )
    if name not in heads:
        raise NoModelError(
            f"transformers has no type {name!r} with a head for image classes or language{nearest(name, heads)}"
        )
    return _small(transformers.CONFIG_MAPPING[name])


def _small(config_class: Any) -> Any:
    """Make a configuration with few layers and small sizes, in its sub-configurations too."""
    usual = config_class()
    # read past the class: some types refuse to name a value that may differ from layer to layer
    values = vars(usual)
    known = {field.name for field in fields(config_class)}
    settings: dict[str, Any] = {}
    for limit, meanings in AT_MOST.items():
        for meaning in meanings:
            stored = config_class.attribute_map.get(meaning, meaning)
            value = values.get(stored)
            if value is None or (type(value) is int and value > limit):
                settings.update({field: limit for field in (stored, meaning) if field in known})
    if "num_key_value_heads" in known:
        grouped = values["num_key_value_heads"] not in (None, values.get("num_attention_heads"))
        settings["num_key_value_heads"] = 2 if grouped else 4
    if isinstance(values.get("depths"), list | tuple):
        settings["depths"] = [min(depth, 2) for depth in values["depths"]]
    settings.update({token: 1 for token in SPECIAL_TOKENS if token in known})
    for name in config_class.sub_configs:
        if hasattr(type(values.get(name)), "sub_configs"):
            settings[name] = _small(type(values[name]))
    return config_class(**settings | ALSO.get(config_class.model_type, {}))


LIBRARY = Library(build=_build, names=_names, native_size=_native_size, rebuild=_rebuild)
