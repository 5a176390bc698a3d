"""The place of the cache, and the bound of its size."""

from __future__ import annotations

import math
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
    """Returns the directory of the cache, which need not exist.

    It is None if the caller has switched the cache off, or if nothing is named and there is no home directory.

    Raises:
      InputError: the named directory begins with a home directory that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        try:
            return Path(named).expanduser().absolute()
        except RuntimeError:
            raise InputError(f"{VARIABLE} is {named!r}, and there is no such home directory: give the path") from None
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says to ignore a relative path.
    if not base or not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    # Without a home directory the "~" stays.
    return Path(base, "vit-ref") if os.path.isabs(base) else None


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
    size = float(match[1]) * unit if match and unit else math.inf
    if math.isinf(size):  # so are numbers of several hundred digits
        raise InputError(f"{name} is {text!r}: give a size, such as 16GiB or 500MB")
    return int(size)


def show_size(size: int) -> str:
    """Returns a number of bytes as text, such as "1.2 GiB"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
