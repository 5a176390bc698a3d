"""Parametrises the benchmarks by the options of `pytest --benchmark-only`, and lets dtypes promote implicitly."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from vit_ref.bench.session import list_implementations, list_workloads, select_able
from vit_ref.errors import InputError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" not in metafunc.fixturenames:
        return
    asked = (metafunc.config.getoption(name) for name in ("size", "batch", "bench_precision"))
    try:
        found = list_workloads(*asked, [])
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    names = list_implementations([])
    metafunc.parametrize(
        ("workload", "name"), [(each, name) for each in found for name in select_able(each, names)], ids=str
    )


@pytest.fixture(autouse=True)
def _timed(request: pytest.FixtureRequest) -> None:
    # pytest-benchmark's own fixture warns if a test asks for it and does not use it.
    if request.config.getoption("benchmark_disable") or hasattr(request.config, "workerinput"):
        pytest.skip("nothing is timed with --benchmark-disable, nor by several processes: leave -n away")


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """FlaxViT promotes implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
