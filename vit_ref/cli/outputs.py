"""Files for the results of commands: checked before the work, and written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from vit_ref.errors import InputError
from vit_ref.files import write

# Standard output as a file. The command then prints nothing else there.
STDOUT = Path("-")


def require_outputs(**files: Path | None) -> None:
    """Checks before the work that each file can be written.

    Args:
      **files: option without its dashes -> the file, or None if the caller gave none.

    Raises:
      InputError: one of them cannot be written, or two are the same file.
    """
    given = {option: file for option, file in files.items() if file}
    for file in given.values():
        if file == STDOUT:
            continue
        if not os.path.isdir(file.absolute().parent):
            raise InputError(f"{file}: its directory does not exist: make it first")
        if os.path.isdir(file):  # Path.is_dir would raise for a name that is too long
            raise InputError(f"{file}: it is a directory: give the name of a file")
        if os.path.islink(file) or (os.path.exists(file) and not os.path.isfile(file)):
            continue  # such as a pipe, which is written to and not replaced
        try:
            with tempfile.TemporaryFile(dir=file.absolute().parent):
                pass
        except OSError as error:
            raise InputError(f"{file}: it cannot be written ({error.strerror}): give another place") from None
    if len(given) > 1 and len({file.resolve() for file in given.values()}) == 1:
        first = next(iter(given.values()))
        options = " and ".join(f"--{option}" for option in given)
        raise InputError(f"{first}: {options} name the same file: give two different files")


def write_output(file: Path, text: str) -> None:
    """Writes the text to a file, or prints it if the file is `STDOUT`.

    Raises:
      InputError: the file cannot be written.
    """
    if file == STDOUT:
        click.echo(text, nl=False)
    else:
        write(file, text)


def write_json(file: Path, content: Any) -> None:
    """Writes a result as JSON to a file, or prints it if the file is `STDOUT`."""
    write_output(file, json.dumps(content, indent=1) + "\n")


def print_result(text: str, json_file: Path | None, content: Any) -> None:
    """Prints a result as text, and writes it as JSON if a file is given.

    Args:
      text: the result as text. It goes to standard error if the JSON goes to standard output.
      json_file: the file for the JSON, or None for no JSON.
      content: the result as JSON takes it.

    Raises:
      InputError: the file cannot be written.
    """
    if json_file:
        write_json(json_file, content)
    click.echo(text, err=json_file == STDOUT)
