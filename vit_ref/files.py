"""Files that are written whole or not at all, and paths that have to be on this machine."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit_ref.errors import InputError

# `pathlib` merges two slashes into one. A drive of Windows has one letter, so the scheme needs two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that takes the place of `path` at the end. On an error nothing changes.

    Args:
      path: the file to write or replace. The temporary file is in the same directory.

    Yields:
      The path to write to.

    Raises:
      OSError: the directory cannot be written to.
    """
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as stage:
        staged = Path(stage, path.name)
        yield staged
        os.replace(staged, path)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that no reader sees a part of it.

    A link, a pipe or a device that exists at the path is not replaced. The text goes into it directly.

    Args:
      path: the file.
      text: its content.

    Raises:
      InputError: the file cannot be written.
    """
    path = Path(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            # Renaming would put a file in the place of /dev/stdout, /dev/null or a pipe.
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        with replacing(path) as staged:
            # The name of a candidate may come from a file name that is not Unicode.
            staged.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{path}: it cannot be written ({error.strerror}): give another place") from None


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL. Otherwise the URL would become a local directory such as `gs:`.

    Args:
      path: the path that the caller gave.
      name: name of the option or argument, for the message.

    Raises:
      InputError: the path is a URL.
    """
    if _URL.match(os.fspath(path)):
        raise InputError(
            f"{name} is {os.fspath(path)}: a URL is no path on this machine: give a local path, and copy the files"
            " yourself"
        )
