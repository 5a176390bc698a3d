"""What a compilation costs: cold, and again from the persistent cache; what it counts and what it will allocate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache


class Cost(NamedTuple):
    """What it cost to get a function ready, and what will be asked of the device; None where XLA has no part in it.

    Attributes:
      cold_s: seconds to trace and compile it, with nothing in any cache; or until the first result was there.
      cached_s: seconds to trace it and load it from the persistent cache.
      flops: floating point operations as XLA counts them, elementwise ones too.
      bytes: of arguments, results and temporaries on one device at its peak; what is donated counts once.
    """

    cold_s: float
    cached_s: float | None = None
    flops: float | None = None
    bytes: int | None = None

    def to_json(self) -> dict[str, float | None]:
        """The same under the names that JSON has."""
        names = ("compile cold s", "compile cached s", "XLA's FLOPs", "peak bytes")
        return dict(zip(names, self, strict=True))


def compile_twice(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> tuple[Any, Cost]:
    """Compiles a function cold, and once more from the cache that this filled.

    Args:
      function: not jitted.
      *arguments: as it will be called.
      donate: which of them it may overwrite.

    Returns:
      The second executable, and its cost.
    """

    def compiled() -> tuple[Any, float]:
        # One of its own each time, of which jax remembers nothing.
        def run(*given: Any) -> Any:
            return function(*given)

        start = time.perf_counter()
        call = jax.jit(run, donate_argnums=donate).lower(*arguments).compile()
        return call, time.perf_counter() - start

    with _empty_cache():
        _, cold = compiled()
        call, cached = compiled()
    memory = call.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return call, Cost(cold, cached, float(call.cost_analysis()["flops"]), held + memory.temp_size_in_bytes)


_OPTIONS: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def _empty_cache() -> Iterator[None]:
    """A persistent cache of its own, whatever the process has, so that cold is cold and cached is cached."""
    with tempfile.TemporaryDirectory() as directory:
        wanted = {**_OPTIONS, "jax_compilation_cache_dir": directory}
        before = {name: getattr(jax.config, name) for name in wanted}
        try:
            for name, value in wanted.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
