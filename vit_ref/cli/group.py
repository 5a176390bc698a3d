"""The command line: `vit-ref verify | compare | convert | propose | finetune | predict | bench | env`.

Exit code 0: passed. 1: the candidate is wrong. 2: the input cannot be used, said in one line. 130: interrupted. 141:
nobody reads on.
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
    """Commands whose errors of input are one line and exit code 2, as click's own are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the installed command."""
        # A path may hold bytes that are no text. It must not fail on printing them once the work is done.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as end:
            if end.code == INTERRUPTED:  # pragma: no cover  # os._exit leaves without its coverage, too
                # At its end Python takes jaxlib down while jaxlib still compiles in threads of its own: a segmentation
                # fault, and exit code 139.
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parses the arguments, which is when help and version are printed."""
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _exit_codes():
            return super().invoke(ctx)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Ends the process with the exit code of what is raised within it, and one line; to click most of it is a 1."""
    try:
        try:
            yield
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except InputError as error:
            say(str(error))
            sys.exit(UNUSABLE)
        except KeyboardInterrupt:
            click.echo(MESSAGE, err=True)
            sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # At its end Python writes what is left, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(UNREAD)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vit-ref", message="vit-ref %(version)s")
def main() -> None:
    """A Vision Transformer in Flax NNX, and proof that ports of ViT weights are numerically right."""
    logging.getLogger("vit_ref").handlers = [Notes()]


for _command in (verify, compare, convert, propose, finetune, predict, bench, env):
    main.add_command(_command)
