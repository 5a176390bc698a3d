"""Does each relative link of the pages at the top of the repository lead to a file that exists?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
# Pages below docs/ are checked where they are built.
PAGES = sorted(path.name for path in ROOT.glob("*.md"))


def links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        yield from (str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
        yield from links(token.children or [])


def missing(text: str, root: Path) -> list[str]:
    """The relative links of a Markdown text that lead to no file below `root`."""
    found = []
    for link in links(MarkdownIt("commonmark").enable("table").parse(text)):
        parts = urlsplit(link)
        if parts.path and not parts.scheme and not parts.netloc:
            target = (root / unquote(parts.path)).resolve()
            if not (target.exists() and target.is_relative_to(root.resolve())):
                found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    assert missing((ROOT / page).read_text(encoding="utf-8"), ROOT) == []


def test_the_readme_is_among_the_pages() -> None:
    assert "README.md" in PAGES


def test_a_missing_file_is_found_in_every_kind_of_link(tmp_path: Path) -> None:
    (tmp_path / "a b.md").write_text("")
    text = """
[here](a%20b.md#part) [gone](gone.md) [out](../tests) ![picture](gone.png) [elsewhere](https://example.org/x) [up](#top)

| [cell](gone-cell.md) | [named] |
| --- | --- |
| | |

[named]: gone-named.md
"""
    assert missing(text, tmp_path) == ["gone.md", "../tests", "gone.png", "gone-cell.md", "gone-named.md"]
