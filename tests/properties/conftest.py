"""Every example compiles anew: what one test has compiled serves no other, and 3 MB each add up."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    jax.clear_caches()
