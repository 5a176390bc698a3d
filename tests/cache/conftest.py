"""Lets each test of the cache begin as a fresh process would."""

from __future__ import annotations

import pytest

from vit_ref.verify.cache import originals


@pytest.fixture(autouse=True)
def _fresh_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the modules that earlier tests saw, because runs of pytest inside a test import some of them again."""
    monkeypatch.setattr(originals, "_originals", {})
    monkeypatch.setattr(originals, "_late", {})
