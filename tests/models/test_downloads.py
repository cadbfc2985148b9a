"""Without a network: soon, in one sentence, and with what is in the caches."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from fxsplit.errors import DataError
from fxsplit.models import downloads
from fxsplit.models.downloads import answers, expect_in_torch_hub, hub_or_its_cache
from fxsplit.models.registry import build


class Refusing(BaseHTTPRequestHandler):
    """Knows no page."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *_args: object) -> None:  # noqa: A002
        """Write nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as made:
        thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield f"http://127.0.0.1:{made.getsockname()[1]}"


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that does not answer, and an empty cache, which is returned."""
    monkeypatch.setattr(downloads, "answers", lambda _url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


def test_a_server_is_there_if_it_answers_at_all(server: str, silent: str) -> None:
    assert answers(f"{server}/none")
    assert not answers(silent, seconds=0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert not answers(f"http://127.0.0.1:{port}")
    assert not answers("no address")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("reached", [False, True])
def test_a_hub_that_does_not_answer_is_not_asked_and_the_setting_is_put_back(
    monkeypatch: pytest.MonkeyPatch, before: bool, reached: bool
) -> None:
    monkeypatch.setattr(downloads, "answers", lambda _url: reached)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)

    def miss() -> None:
        with hub_or_its_cache():
            assert huggingface_hub.is_offline_mode() == (before or not reached)
            raise FileNotFoundError("missing")

    with pytest.raises(OSError, match="does not answer" if not before and not reached else "missing"):
        miss()
    assert huggingface_hub.is_offline_mode() == before


@pytest.mark.parametrize(
    ("spec", "server"),
    [
        ("timm:resnet18", "https://huggingface.co"),
        ("timm:hf-hub:someone/tiny", "https://huggingface.co"),
        ("hf:someone/tiny", "https://huggingface.co"),
        ("timm:resnet18.tv_in1k", "https://huggingface.co"),
        ("torchvision:resnet18", "https://download.pytorch.org"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_without_a_network_one_sentence_says_so(
    spec: str, server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    with pytest.raises(DataError) as caught:
        build(spec, num_classes=7, img_size=32, pretrained=True)
    assert f"{spec!r} cannot be downloaded or read ({server} does not answer); connect" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_torch_has_kept_needs_no_network(no_hub: Path) -> None:
    url = "https://nowhere.invalid/models/weights.pth?x=1"
    with pytest.raises(ConnectionError, match=r"^https://nowhere.invalid does not answer$"):
        expect_in_torch_hub(url)
    folder = Path(torch.hub.get_dir(), "checkpoints")
    assert folder.is_relative_to(no_hub.parent)
    folder.mkdir(parents=True)
    (folder / "weights.pth").touch()
    expect_in_torch_hub(url)
