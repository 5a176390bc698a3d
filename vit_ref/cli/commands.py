"""The command line: `vit-ref verify | compare | convert | propose | finetune | predict | bench | cache | env`.

A new command is a file beside this one, and one more name in the last line here.

Exit codes:

- 0: passed.
- 1: a check failed.
- 2: the input cannot be used; one line says why.
- 130: interrupted.
- 141: the reader closed the pipe.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from vit_ref.cli.bench import bench
from vit_ref.cli.cache import cache
from vit_ref.cli.compare import compare
from vit_ref.cli.console import Notes, say
from vit_ref.cli.convert import convert
from vit_ref.cli.env import env
from vit_ref.cli.finetune import finetune
from vit_ref.cli.interrupts import INTERRUPTED, MESSAGE
from vit_ref.cli.predict import predict
from vit_ref.cli.propose import propose
from vit_ref.cli.verify import verify
from vit_ref.errors import InputError

UNUSABLE, UNREAD = 2, 141


class _Group(click.Group):
    """Group of commands that report unusable input, and click's own usage errors, in one line with exit code 2."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the installed command."""
        # A path may hold bytes that are not text. Printing one must not fail after all the work.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as end:
            if end.code == INTERRUPTED:  # pragma: no cover  # os._exit leaves without its coverage, too
                # A normal exit unloads jaxlib while its threads still compile: a segmentation fault, exit code 139.
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parses the arguments. click prints help and version here."""
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _exit_codes():
            return super().invoke(ctx)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns an exception raised within it into one line and the exit code. click itself would use 1 for most."""
    try:
        try:
            yield
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            say(" ".join(f"{error.format_message()}{_help_of(error)}".split()))
            sys.exit(error.exit_code)
        except InputError as error:
            say(str(error))
            sys.exit(UNUSABLE)
        except KeyboardInterrupt:
            click.echo(MESSAGE, err=True)
            sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Python flushes the streams when it exits, and would complain about the closed pipe.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(UNREAD)


def _help_of(error: click.UsageError) -> str:
    """Says how to get help on the command that refused what it was given."""
    end = "" if error.format_message().rstrip().endswith((".", "?")) else "."
    return f"{end} Help: {error.ctx.command_path if error.ctx else 'vit-ref'} --help"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vit-ref", message="vit-ref %(version)s")
def main() -> None:
    """A Vision Transformer in Flax NNX, and a suite that proves ports of ViT weights numerically right."""
    logging.getLogger("vit_ref").handlers = [Notes()]


for _command in (verify, compare, convert, propose, finetune, predict, bench, cache, env):
    main.add_command(_command)
