"""No test's roofline is another's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vit_ref.bench.roofline import matmul_flops


@pytest.fixture(autouse=True)
def _rooflines_are_measured_anew() -> Iterator[None]:
    matmul_flops.cache_clear()
    yield
    matmul_flops.cache_clear()
