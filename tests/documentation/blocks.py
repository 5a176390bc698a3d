"""Runs every code block of the README and of docs: python -m pytest -p tests.documentation.blocks README.md docs.

- `python` runs in one namespace a page. With `title="FILE.py"` the block is written to that file instead.
- `sh` runs in bash, and has to end with exit code 0, or with N under `title="exit code N"`.
- `text` is the output of the block before it. Numbers, digests and names of sites may differ, and `...` stands for
  anything.
- Any other block, and any block that cannot run, needs a mark before it: `<!-- skip: next "the reason" -->`.

Each page has a folder of its own. In it are the checkout's `tests` and `examples`, the worked candidates, a small
checkpoint at `path/to/checkpoint`, and `photo.png`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from vit_ref.verify.cases import CASES

ROOT = Path(__file__).parents[2]
WORKED = ROOT / "tests" / "candidates" / "worked"
# Seconds for one shell block. The longest, which fine-tunes a small model, takes a minute on two quiet cores.
LIMIT = 900
# Two machines may print another digest, site of a block, or number.
_VARYING = re.compile(r"\b[0-9a-f]{64}\b|\bblocks?\.\d+[\w.]*|\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


class Reasons(SkipParser):
    """Skips that give a reason; any other is an error when the page is read."""

    def __call__(self, document: Document) -> Iterator[Region]:
        for region in super().__call__(document):
            action, reason = region.parsed
            if action != "next" or not reason:
                raise ValueError(f'{document.path}: a skip without a reason: write <!-- skip: next "the reason" -->')
            yield region


class Blocks:
    """All fenced blocks, whatever their language."""

    _lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?[^\n]*\n"))

    def __call__(self, document: Document) -> Iterator[Region]:
        for region in self._lexer(document):
            region.parsed, region.evaluator = region.lexemes["source"], evaluate
            yield region


def evaluate(example: Example) -> str | None:
    """Runs a block, or compares it with the output of the block before. A text is what is wrong."""
    language, title = example.region.lexemes["language"], example.region.lexemes["title"] or ""
    namespace, source = example.namespace, str(example.parsed)
    match language:
        case "python" if title:
            Path(namespace["folder"], title).write_text(source, encoding="utf-8")
        case "python":
            written = io.StringIO()
            code = compile("\n" * (example.line + 1) + source, example.path, "exec", dont_inherit=True)
            with contextlib.chdir(namespace["folder"]), contextlib.redirect_stdout(written):
                exec(code, namespace)
            namespace["output"] = written.getvalue()
        case "sh":
            expected = int(title.removeprefix("exit code ") or 0)
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", source],
                cwd=namespace["folder"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
                check=False,
            )
            namespace["output"] = done.stdout
            if done.returncode != expected:
                return f"exit code {done.returncode}, and not {expected}:\n{done.stdout}"
        case "text":
            found = namespace.pop("output", None)
            if found is None:
                return "there is no output before this block: mark it with a skip"
            pattern = ".*".join(re.escape(part) for part in _comparable(source).split("..."))
            if not re.fullmatch(pattern, _comparable(found), re.DOTALL):
                return f"the page says:\n{source}\nthe block before it printed:\n{found}"
        case _:
            return f"a block in {language or 'no language'} cannot run: mark it with a skip"
    return None


def _comparable(text: str) -> str:
    return " ".join(_VARYING.sub("#", text).split())


@functools.cache
def _template() -> Path:
    """The folder that each page gets a copy of."""
    folder = Path(tempfile.mkdtemp(prefix="documentation-"))
    CASES["rectangular"].write(folder / "path" / "to" / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    for file in WORKED.glob("*.py"):
        shutil.copy(file, folder)
    for name in ("tests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def _enter(namespace: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="page-"))
    namespace["folder"] = shutil.copytree(_template(), folder, symlinks=True, dirs_exist_ok=True)
    # No page depends on what an earlier run left on the disk.
    os.environ["VIT_REF_CACHE"] = str(folder / "cache")


def _leave(namespace: dict[str, Any]) -> None:
    shutil.rmtree(namespace["folder"])


def pytest_unconfigure() -> None:
    """Removes the template, if a page was read."""
    if _template.cache_info().currsize:
        shutil.rmtree(_template())


pytest_collect_file = Sybil(
    [Reasons(), Blocks()], pattern="*.md", path=str(ROOT), setup=_enter, teardown=_leave
).pytest()
