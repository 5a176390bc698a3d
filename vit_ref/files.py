"""Files that are there whole or not at all, and paths that have to be on this machine."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit_ref.errors import InputError

# `pathlib` makes one slash of two. A drive of Windows has one letter.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, beside `path`, which takes its place once all of it is written; on an error nothing changes.

    Raises:
      OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as stage:
        staged = Path(stage, path.name)
        yield staged
        os.replace(staged, path)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that it is never there in part.

    What is there and no regular file, such as a link, a pipe or a device, is written to as it is.

    Raises:
      InputError: it cannot be written there.
    """
    path = Path(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            # /dev/stdout, /dev/null, a pipe: renaming would put a file in its place.
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        with replacing(path) as staged:
            # A candidate's name may come from a file name that is not Unicode.
            staged.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}): name a file in a directory of yours") from None


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
