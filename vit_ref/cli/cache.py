"""The command `vit-ref cache`: shows, bounds and clears what verifications keep on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from vit_ref.cli.options import json_option
from vit_ref.cli.outputs import print_result, require_outputs
from vit_ref.errors import InputError
from vit_ref.verify.cache.place import OFF, VARIABLE, find_place, parse_size, show_size
from vit_ref.verify.cache.store import KINDS, Store, require_directory


@click.command()
@click.option("--clear", is_flag=True, help="Remove every entry. Other files in the directory stay.")
@click.option("--limit", metavar="SIZE", help="Bound the size from now on, such as 16GiB. Default: 8GiB.")
@json_option
def cache(clear: bool, limit: str | None, json_file: Path | None) -> None:
    """Show the place, the entries and the size of the cache.

    verify, compare and propose keep compiled programs there. verify also keeps what reference and oracle compute,
    which does not depend on the candidate. A later run reads them, and its report is the same.

    The directory is that of the environment variable VIT_REF_CACHE, or vit-ref in XDG_CACHE_HOME, or ~/.cache/vit-ref.
    VIT_REF_CACHE=off switches the cache off. Beyond the bound the entries go that were not used for the longest time.
    The variable VIT_REF_CACHE_LIMIT sets the bound too, and wins over --limit.
    """
    require_outputs(json=json_file)
    place = find_place()
    if place is None and os.environ.get(VARIABLE) == OFF:
        raise InputError(f"{VARIABLE} is {OFF!r}, so there is no cache: name a directory, or unset it")
    if place is None:
        raise InputError(f"there is no home directory, so there is no cache: name a directory in {VARIABLE}")
    size = None if limit is None else parse_size(limit, "--limit")
    require_directory(place)
    store = Store(place)
    _ = store.limit  # so that a variable that is no size is reported before anything changes
    if size is not None:
        store.set_limit(size)
    removed = store.clear() if clear else None
    print_result("\n".join(_lines(store, removed)), json_file, _content(store))


def _lines(store: Store, removed: tuple[int, int] | None) -> list[str]:
    """Returns what the command prints, and before it how many entries and bytes were removed."""
    entries = store.entries()
    lines = [str(store.root)]
    if removed is not None:
        lines.append(f"removed: {_entries(*removed)}")
    for kind, meaning in KINDS.items():
        sizes = [entry.size for entry in entries if entry.kind == kind]
        if sizes:
            lines.append(f"{meaning}: {_entries(len(sizes), sum(sizes))}")
    total = _entries(len(entries), sum(entry.size for entry in entries))
    return [*lines, f"in all: {total} of at most {show_size(store.limit)}"]


def _content(store: Store) -> dict[str, Any]:
    """Returns the same as JSON takes it."""
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for entry in store.entries():
        found[entry.kind]["count"] += 1
        found[entry.kind]["bytes"] += entry.size
    return {"place": str(store.root), "limit": store.limit, "entries": found}


def _entries(count: int, size: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}, {show_size(size)}"
