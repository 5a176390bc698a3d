"""The compiled programs of jax, kept in a `Store`.

jax has a cache on disk of its own, which has no digest of its entries. Their compression notices some damage: zlib all
of 300 flipped bits of one entry, but zstandard, which jax takes if it is installed, only half of them. jax would load
the other half as code. So jax gets its entries from a `Store`, which compares a digest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as public

from vit_ref.verify.cache.identity import machine
from vit_ref.verify.cache.store import Store

_LOG = logging.getLogger("vit_ref")


@contextlib.contextmanager
def keeping_programs(store: Store) -> Iterator[None]:
    """Lets jax read and write its compiled programs in a store, within the context.

    A compilation cache that the caller gave to jax is used instead.

    Args:
      store: the store.
    """
    options = jax.config.values
    if options["jax_compilation_cache_dir"] or not options["jax_enable_compilation_cache"]:
        yield
        return
    # jax has no public way to bring a cache of one's own.
    try:
        from jax._src import compilation_cache as private
        from jax._src.compilation_cache_interface import CacheInterface

        free = private._cache is None and not private._cache_initialized
    except (ImportError, AttributeError):
        _LOG.warning(f"jax {jax.__version__} takes no cache of compiled programs: this run compiles all of them")
        yield
        return
    if not free:  # another verification of this process, around this one
        yield
        return

    class Programs(CacheInterface):
        """jax's interface, over the store."""

        _path = pathlib.Path(store.root)

        def __init__(self) -> None:
            self._machine = machine()

        def _key(self, key: str) -> str:
            # jax's key has its versions, its flags and the device, but not the instructions that the processor knows.
            return hashlib.sha256(f"{self._machine}\n{key}".encode()).hexdigest()

        def get(self, key: str) -> bytes | None:
            found = store.read("programs", self._key(key))
            return None if found is None else bytes(found)

        def put(self, key: str, value: bytes) -> None:
            store.write("programs", self._key(key), [value])

    before = options["jax_persistent_cache_min_compile_time_secs"]
    # Operations that run one by one are hundreds of programs, each compiled in milliseconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    private._cache, private._cache_initialized = Programs(), True
    try:
        yield
    finally:
        public.reset_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
