"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vit_ref.files import require_local


class _LocalPath(click.Path):
    """Path on this machine. The command refuses a URL before any work."""

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else "the path"
        require_local(value, name)
        return super().convert(value, parameter, ctx)


LOCAL = _LocalPath(path_type=Path)

ignore_option = click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Leave out unexpected tensors with matching names; repeatable."
)
cache_option = click.option(
    "--cache/--no-cache", default=True, show_default=True, help="Keep results for later runs; see vit-ref cache."
)
fail_fast_option = click.option(
    "--fail-fast",
    is_flag=True,
    help="End the run after the first part that fails. A wrong formula ends it before rounding is measured.",
)
json_option = click.option(
    "--json", "json_file", type=LOCAL, metavar="FILE", help="Write the result as JSON; - prints it."
)
