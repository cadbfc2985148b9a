"""Tells soon that there is no network. The libraries that download weights try for a minute, or wait for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

# How long a server may take to answer at all.
PATIENCE_SECONDS = 4.0


def answers(url: str, seconds: float = PATIENCE_SECONDS) -> bool:
    """Tell whether the server of `url` answers within so many seconds; also with an error, such as 404."""
    heard = []

    def ask() -> None:
        with suppress(OSError, HTTPException, ValueError):
            try:
                urlopen(Request(url, method="HEAD"), timeout=seconds).close()
            except HTTPError as answer:
                answer.close()
            heard.append(True)

    # A timeout of sockets bounds neither the lookup of a name nor the number of addresses that are tried.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(heard)


@contextmanager
def hub_or_its_cache() -> Iterator[None]:
    """Inside, files of Hugging Face's hub come from its cache alone if the hub does not answer.

    Raises ConnectionError instead of any other OSError in that case: the file is not in the cache then.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    silent = not offline and not answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline or silent
    try:
        yield
    except OSError as error:
        if silent:
            raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline


def expect_in_torch_hub(url: str) -> None:
    """Raise ConnectionError if `torch.hub` would have to download `url`, and its server does not answer."""
    address = urlsplit(url)
    kept = Path(torch.hub.get_dir(), "checkpoints", Path(address.path).name)
    if not kept.exists() and not answers(url):
        raise ConnectionError(f"{address.scheme}://{address.netloc} does not answer")
