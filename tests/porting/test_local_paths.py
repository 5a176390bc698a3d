"""Is a URL in place of a local path refused before any work, without making a directory of that name?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vit_ref.cli.commands import main
from vit_ref.errors import InputError
from vit_ref.files import require_local
from vit_ref.weights.conversion import convert
from vit_ref.weights.pretrained import save_pretrained

URL = "gs://bucket/run"
ADVICE = "a URL is no path on this machine: give a local path, and copy the files yourself"


# No checkpoint is at this path, so a later error would name it.
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["finetune", "gone", "--output-dir", URL], "--output-dir"),
        (["convert", "gone", URL, "--to", "hf"], "the path"),
        (["verify", "gone", "--html", URL], "--html"),
        (["verify", "gone", "--json", URL], "--json"),
        (["verify", "gone", "--images", URL], "--images"),
        (["bench", "--plot", URL], "--plot"),
        (["bench", "--json", URL], "--json"),
        (["predict", "gone", "a.png", URL], "the path"),
    ],
)
def test_the_commands_refuse_it_in_one_line(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(main, arguments)
    assert (ended.exit_code, ended.output) == (2, f"vit-ref: {name} is {URL}: {ADVICE}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [lambda: convert("gone", Path(URL), "hf"), lambda: save_pretrained(None, URL)],
    ids=["convert", "save_pretrained"],
)
def test_so_does_python(call: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f" is gs:/{{1,2}}bucket/run: {ADVICE}$"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [URL, Path(URL), "s3://a", "https://a/b.png", "file:///a", "hf://a/b"], ids=str)
def test_a_url_is_known_with_one_slash_too(path: str | Path) -> None:
    with pytest.raises(InputError, match=ADVICE):
        require_local(path, "out")


@pytest.mark.parametrize("path", ["run", "/a/b", "./gs:/a", "a:b", "C:/a", "12:/a", "a/gs://b"])
def test_a_path_is_none(path: str) -> None:
    require_local(path, "out")
