"""The files that commands write their results to: checked before the work, and whole or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from vit_ref.errors import InputError
from vit_ref.files import write

# As a file, standard output: a command then prints nothing else there.
STDOUT = Path("-")


def require_outputs(**files: Path | None) -> None:
    """Checks before minutes of work that each file can be written.

    Args:
      files: by option, without its dashes.

    Raises:
      InputError: one of them cannot be written, or two are the same.
    """
    given = {option: file for option, file in files.items() if file}
    for file in given.values():
        if file == STDOUT:
            continue
        if not os.path.isdir(file.absolute().parent):
            raise InputError(f"{file}: no such directory: make it first")
        if os.path.isdir(file):  # unlike Path.is_dir, it takes a name that is too long
            raise InputError(f"{file}: is a directory: name a file")
        if os.path.islink(file) or (os.path.exists(file) and not os.path.isfile(file)):
            continue  # a pipe, say, which is written to and not replaced
        try:
            with tempfile.TemporaryFile(dir=file.absolute().parent):
                pass
        except OSError as error:
            raise InputError(f"{file}: cannot be written there ({error.strerror}): name another place") from None
    if len(given) > 1 and len({file.resolve() for file in given.values()}) == 1:
        first = next(iter(given.values()))
        raise InputError(f"{first}: {' and '.join(f'--{option}' for option in given)} are the same file: give two")


def write_output(file: Path, text: str) -> None:
    """Writes a file, or prints the text.

    Raises:
      InputError: it cannot be written there.
    """
    if file == STDOUT:
        click.echo(text, nl=False)
    else:
        write(file, text)


def write_json(file: Path, content: Any) -> None:
    """Writes a result for machines; see `write_output`."""
    write_output(file, json.dumps(content, indent=1) + "\n")


def print_result(text: str, json_file: Path | None, content: Any) -> None:
    """Prints a result for people, and writes it for machines if a file is given.

    Args:
      text: goes to standard error if the JSON goes to standard output.
      json_file: takes the JSON; None for no JSON.
      content: what the JSON holds.

    Raises:
      InputError: the file cannot be written.
    """
    if json_file:
        write_json(json_file, content)
    click.echo(text, err=json_file == STDOUT)
