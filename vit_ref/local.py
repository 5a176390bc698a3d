"""Paths that have to be on this machine."""

from __future__ import annotations

import os
import re

from vit_ref.errors import InputError

# `pathlib` makes one slash of two. A drive of Windows has one letter.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL, of which a directory `gs:` would be made here.

    Args:
      path: what was given.
      name: of the option or argument, for the message.

    Raises:
      InputError: it is a URL.
    """
    if _URL.match(os.fspath(path)):
        raise InputError(
            f"{name} is {os.fspath(path)}: a URL is no path on this machine: give a local path, and copy the files"
            " yourself"
        )
