"""The cost of a compilation: cold, and again from the persistent cache, with operations and memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache


class Cost(NamedTuple):
    """Cost of preparing a function, and its demand on the device. A field is None if XLA does not compile the function.

    Attributes:
      cold_s: seconds to trace and compile with empty caches, or until the first result.
      cached_s: seconds to trace, and to load from the persistent cache.
      flops: floating point operations, elementwise ones included, as XLA counts them.
      bytes: peak memory of arguments, results and temporaries on one device. A donated argument counts once.
    """

    cold_s: float
    cached_s: float | None = None
    flops: float | None = None
    bytes: int | None = None

    def to_json(self) -> dict[str, float | None]:
        """Returns the fields under their names in JSON."""
        names = ("compile cold s", "compile cached s", "XLA's FLOPs", "peak bytes")
        return dict(zip(names, self, strict=True))


def compile_twice(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> tuple[Any, Cost]:
    """Compiles a function cold, and again from the cache that the first compilation filled.

    Args:
      function: the function, not jitted.
      *arguments: the arguments of a later call.
      donate: positions of the arguments that the function may overwrite.

    Returns:
      The second executable, and the cost.
    """

    def compiled() -> tuple[Any, float]:
        # A new function each time, because jax would remember an old one.
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
    """Replaces the process's persistent cache by an empty one, so that "cold" and "cached" mean what they say."""
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
