"""Reports as files."""

from __future__ import annotations

import os
from pathlib import Path

from vit_ref.atomic import replacing
from vit_ref.errors import InputError


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
