"""Reads how the caller names a candidate or a reference: `FILE.py:attribute` or `module:attribute`.

The commands call it before they import jax, so that a wrong path is refused at once.
"""

from __future__ import annotations

import os

from vit_ref.errors import CandidateError


def split_spec(spec: str) -> tuple[str, str]:
    """Returns the file or module and the attribute that the caller names.

    Args:
      spec: `FILE.py:attribute` or `module:attribute`; the attribute may be left out, and is "" then.

    Raises:
      CandidateError: the file does not exist, or `spec` is neither a file nor the name of a module.
    """
    place, _, attribute = spec.partition(":")
    if place.endswith(".py"):
        if not os.path.isfile(place):
            raise CandidateError(f"{place}: this file does not exist: check the path")
    elif not all(part.isidentifier() for part in place.split(".")):
        raise CandidateError(f"{place}: this is neither a Python file nor the name of a module: give FILE.py or module")
    return place, attribute
