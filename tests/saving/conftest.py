from __future__ import annotations

import pytest

from fxsplit.saving import signals


@pytest.fixture(autouse=True)
def wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each signal counts, however soon after another one."""
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
