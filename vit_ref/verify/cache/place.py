"""The place of the cache, and the bound of its size."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vit_ref.errors import InputError

# The directory of the cache. The value "off" keeps every verification without one.
VARIABLE = "VIT_REF_CACHE"
OFF = "off"
# The bound of the size, such as 16GiB. It wins over the bound that `vit-ref cache --limit` wrote.
LIMIT_VARIABLE = "VIT_REF_CACHE_LIMIT"
# A ViT-S/14 takes 0.8 GB for the values on four images, and 1.1 GB for the gradients of three objectives on one.
DEFAULT_LIMIT = 8 * 2**30

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def find_place() -> Path | None:
    """Returns the directory of the cache, which need not exist; None if the caller has switched it off."""
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says to ignore a relative path.
    if not base or not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base, "vit-ref")


def parse_size(text: str, name: str) -> int:
    """Returns a size in bytes.

    Args:
      text: the size, such as "16GiB", "500 MB" or a number of bytes.
      name: the name of the option or variable, for the message.

    Raises:
      InputError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit:
        raise InputError(f"{name} is {text!r}: give a size, such as 16GiB or 500MB")
    return int(float(match[1]) * unit)


def show_size(size: int) -> str:
    """Returns a number of bytes as text, such as "1.2 GiB"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
