"""Opens the cache for one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vit_ref.verify.cache import originals
from vit_ref.verify.cache.place import find_place
from vit_ref.verify.cache.programs import keeping_programs
from vit_ref.verify.cache.store import Store


@contextlib.contextmanager
def opened(wanted: bool) -> Iterator[Store | None]:
    """Opens the cache, lets jax keep its compiled programs there, and trims the cache at the end.

    Args:
      wanted: whether the caller wants a cache.

    Yields:
      The store, or None if there is no cache: the caller does not want one, VIT_REF_CACHE is "off", or the user has no
      home directory.

    Raises:
      InputError: VIT_REF_CACHE_LIMIT is no size, or VIT_REF_CACHE is in a home directory that does not exist.
    """
    place = find_place() if wanted else None
    if place is None:
        yield None
        return
    store = Store(place)
    originals.remember()
    _ = store.limit  # so that a limit that is no size is reported before the work
    try:
        with keeping_programs(store):
            yield store
    finally:
        store.trim()
