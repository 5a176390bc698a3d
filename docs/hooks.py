"""Writes the table of pytest's options into its page when mkdocs builds the site."""

from __future__ import annotations

from typing import Any

from vit_ref.testing import plugin

MARK = "<!-- the options of vit_ref.testing.plugin -->"


class _Options:
    """Takes the place of pytest's parser and of its group, and notes each option."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def getgroup(self, *_: str) -> _Options:
        return self

    def addoption(self, name: str, *, help: str, metavar: str = "", choices: tuple[str, ...] = (), **_: Any) -> None:
        values = metavar or ", ".join(choices)
        self.rows.append(f"| `{name}` | {values.replace('|', ' or ')} | {help} |")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table where a page has `MARK`."""
    if MARK not in markdown:
        return markdown
    options = _Options()
    plugin.pytest_addoption(options)  # type: ignore[arg-type]
    return markdown.replace(MARK, "\n".join(["| option | value | meaning |", "| --- | --- | --- |", *options.rows]))
