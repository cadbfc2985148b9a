"""Weights from files: each format gives the same model bit for bit, runs no code, and says what did not fit."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fxsplit.errors import UsageError
from fxsplit.models.weights import load_weights, read_weights

State = dict[str, Tensor]


def net(seed: int, classes: int = 3, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(4 * width, classes))


def start(model: nn.Module, path: Path, classes: int = 3) -> str:
    return load_weights(model, read_weights(path), source=path.name, num_classes=classes)


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def legacy(found: Any, path: Path) -> None:
    torch.save(found, path, _use_new_zipfile_serialization=False)


def wrapped(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("name", "write", "contents"),
    [
        ("a.safetensors", safetensors.torch.save_file, lambda state: state),
        ("a.SafeTensors", safetensors.torch.save_file, lambda state: wrapped(state, "module.")),
        ("a.pth", torch.save, lambda state: state),
        ("a.pt", legacy, lambda state: state),
        ("a.bin", torch.save, lambda state: wrapped(state, "_orig_mod.")),
        ("a.pth", torch.save, lambda state: wrapped(state, "module._orig_mod.")),
        ("a.pth", torch.save, lambda state: wrapped(state, "_orig_mod.module.")),
        ("a.pth.tar", torch.save, lambda state: {"state_dict": wrapped(state, "module."), "args": Namespace(lr=1)}),
        ("a.pth", torch.save, lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}}}),
        ("a.pth", torch.save, lambda state: {"state_dict": state, "state_dict_ema": net(9).state_dict()}),
        ("a.pth", torch.save, lambda state: {"model": state, "model_ema": net(9).state_dict()}),
        ("a.pth", torch.save, lambda state: {"state_dict_ema": state}),
        ("a.pth", torch.save, lambda state: {"model_ema": state, "state_dict": None}),
    ],
)
def test_every_format_gives_the_model_that_was_saved(
    tmp_path: Path, name: str, write: Callable[[Any, Path], None], contents: Callable[[State], Any]
) -> None:
    saved, model = net(1), net(2)
    write(contents(saved.state_dict()), tmp_path / name)
    assert start(model, tmp_path / name) == f"9 of 9 tensors start from '{name}'"
    assert_equal(model.state_dict(), saved.state_dict())


def test_a_folder_of_a_run_stands_for_its_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file(net(1).state_dict(), tmp_path / "model.safetensors")
    assert_equal(read_weights(tmp_path), net(1).state_dict())


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    saved, model = (nn.ModuleDict({"module": net(seed)}) for seed in (1, 2))
    torch.save(wrapped(saved.state_dict(), "module."), tmp_path / "a.pth")
    start(model, tmp_path / "a.pth")
    assert_equal(model.state_dict(), saved.state_dict())


def test_a_head_for_other_classes_starts_at_zero_and_is_named(tmp_path: Path) -> None:
    saved, model = net(1, classes=5), net(2)
    expected = {**saved.state_dict(), "3.weight": torch.zeros_like(net(2)[3].weight), "3.bias": torch.zeros(3)}
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    assert start(model, tmp_path / "a.pth") == (
        "7 of 9 tensors start from 'a.pth'; those for another number of classes start at zero: 3.weight, 3.bias"
    )
    assert_equal(model.state_dict(), expected)


def test_names_that_are_missing_or_unexpected_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    state = net(1).state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "0.bias"):
        del state[name]
    torch.save({**state, **{f"extra.{index}": torch.zeros(1) for index in range(4)}}, tmp_path / "a.pth")
    assert start(net(2), tmp_path / "a.pth") == (
        "5 of 9 tensors start from 'a.pth'; 4 are missing there: 0.bias, 1.running_mean, 1.running_var, ...; "
        "4 in the file are not the model's: extra.0, extra.1, extra.2, ..."
    )


def test_tied_tensors_are_not_missed(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    saved, model = tied(1), tied(2)
    safetensors.torch.save_model(saved, str(tmp_path / "a.safetensors"))
    assert start(model, tmp_path / "a.safetensors") == "6 of 6 tensors start from 'a.safetensors'"
    assert_equal(model.state_dict(), saved.state_dict())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            nn.Sequential(nn.Linear(7, 7), *net(1)[1:]),
            r"0.weight has the shape \(7, 7\) there and \(4, 3, 3, 3\) here, and 1 more",
        ),
        (
            nn.ModuleDict({"a": nn.Linear(7, 7)}),
            r"of 9 tensors 9 are missing \(0.weight, .*2 are unexpected \(a.weight",
        ),
        (net(1)[:1], r"of 9 tensors 7 are missing \(1.weight, .*and 0 are unexpected$"),
        (net(1, width=5), r"0.weight has the shape \(5, 3, 3, 3\) there and \(4, 3, 3, 3\) here, and 6 more"),
    ],
)
def test_the_weights_of_another_model_are_refused_and_leave_it_as_it_is(
    tmp_path: Path, other: nn.Module, words: str
) -> None:
    torch.save(other.state_dict(), tmp_path / "a.pth")
    model = net(2)
    with pytest.raises(UsageError, match=r"'a.pth' holds the weights of another model: .*" + words):
        start(model, tmp_path / "a.pth")
    assert_equal(model.state_dict(), net(2).state_dict())


def test_long_and_unprintable_names_make_no_long_sentence(tmp_path: Path) -> None:
    torch.save({"\x1b" + "a" * 5000: torch.zeros(1), **net(1).state_dict()}, tmp_path / "a.pth")
    sentence = start(net(2), tmp_path / "a.pth")
    assert sentence.isprintable()
    assert len(sentence) < 500


def test_tensors_without_numbers_are_refused(tmp_path: Path) -> None:
    torch.save(net(1).to("meta").state_dict(), tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"'a.pth' cannot be loaded: .*0.weight"):
        start(net(2), tmp_path / "a.pth")


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [torch.save, legacy, None])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_a_pickle_that_needs_code_is_refused_and_does_not_run(
    tmp_path: Path, suffix: str, write: Callable[[Any, Path], None] | None, protocol: int
) -> None:
    contents = {"state_dict": net(1).state_dict(), "more": Evil(tmp_path / "ran")}
    path = tmp_path / f"a{suffix}"
    if write:
        write(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents["more"], protocol=protocol))
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(caught.value)
    if suffix != ".safetensors" and write:
        assert f"a{suffix}' is not read: it asks for {os.mkdir.__module__}.mkdir, which is code" in str(caught.value)


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(net(1), tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"it asks for torch.nn.modules.* save the weights alone"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_broken_files_are_refused_in_one_sentence(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(net(1).state_dict(), path)
    contents = path.read_bytes()
    path.write_bytes(contents[: kept if isinstance(kept, int) else int(kept * len(contents))])
    with pytest.raises(UsageError, match=rf"a{suffix}' (cannot be read|is not read)") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "contents", [{}, [torch.zeros(2)], torch.zeros(2), {"epoch": 3}, {"state_dict": {}}, {0: torch.zeros(2)}]
)
def test_a_file_without_weights_is_refused(tmp_path: Path, contents: Any) -> None:
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a.pth' holds no weights"):
        read_weights(tmp_path / "a.pth")


def test_a_missing_file_is_said_with_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UsageError, match=r"no file of weights '.*weight.pth'; did you mean 'weights.pth'\?"):
        read_weights(tmp_path / "weight.pth")
    with pytest.raises(UsageError, match=r"no file of weights '.*model.safetensors'"):
        read_weights(tmp_path)


def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")  # reading it would wait for ever
    with pytest.raises(UsageError, match=r"no file of weights"):
        read_weights(tmp_path / "a.pth")
