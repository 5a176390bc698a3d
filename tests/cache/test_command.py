"""Does `vit-ref cache` show, bound and clear what is kept, and do the commands pass on whether to keep anything?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.helpers.synthetic_reports import REPORTS
from vit_ref.cli.commands import main
from vit_ref.verify import session, stream
from vit_ref.verify.cache.store import Store
from vit_ref.verify.pairs import session as pairs


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("VIT_REF_CACHE", str(tmp_path))
    store = Store(tmp_path)
    store.write("errors", "1" * 64, [bytes(952)])
    store.write("errors", "2" * 64, [bytes(952)])
    store.write("programs", "3" * 64, [bytes(3000)])
    return store


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


def test_it_shows_place_entries_and_size(store) -> None:
    ended = invoke()
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        str(store.root),
        "compiled programs: 1 entry, 3.0 KiB",
        "errors of references: 2 entries, 2.0 KiB",
        "in all: 3 entries, 4.9 KiB of at most 8.0 GiB",
    ]


def test_it_writes_json(store) -> None:
    ended = invoke("--json", "-")
    found = json.loads(ended.stdout)
    assert found["place"] == str(store.root)
    assert found["limit"] == 8 * 2**30
    assert found["entries"]["errors"] == {"count": 2, "bytes": 2000}


def test_it_clears(store) -> None:
    (store.root / "mine").write_text("")
    ended = invoke("--clear")
    assert ended.exit_code == 0
    assert "removed: 3 entries, 4.9 KiB" in ended.stdout
    assert "in all: 0 entries, 0 B" in ended.stdout
    assert store.entries() == []
    assert (store.root / "mine").exists()


def test_it_bounds(store) -> None:
    assert "in all: 1 entry" in invoke("--limit", "3100").stdout
    assert "of at most 3.0 KiB" in invoke().stdout


@pytest.mark.parametrize(
    ("arguments", "variable", "line"),
    [
        (["--limit", "much"], "", "vit-ref: --limit is 'much': give a size, such as 16GiB or 500MB"),
        ([], "off", "vit-ref: VIT_REF_CACHE is 'off', so there is no cache: name a directory, or unset it"),
    ],
)
def test_unusable_input_is_one_line(store, monkeypatch, arguments, variable, line) -> None:
    if variable:
        monkeypatch.setenv("VIT_REF_CACHE", variable)
    ended = invoke(*arguments)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (2, "", f"{line}\n")
    assert len(store.entries()) == 3


@pytest.mark.parametrize("arguments", [[], ["--clear"], ["--limit", "1GB"]])
def test_a_directory_that_cannot_be_used_is_one_line(store, arguments) -> None:
    entries = store.root / "entries"
    entries.chmod(0o777)
    ended = invoke(*arguments)
    line = (
        f"vit-ref: {entries}: the cache cannot be used (others may write there): make it yours alone, or name another"
        " directory in VIT_REF_CACHE\n"
    )
    assert (ended.exit_code, ended.stdout, ended.stderr) == (2, "", line)
    assert len(store.entries()) == 3
    assert not (store.root / "limit").exists()


@pytest.mark.parametrize("arguments", [["--clear"], ["--limit", "1GB"]])
def test_a_variable_that_is_no_size_is_reported_before_anything_changes(store, monkeypatch, arguments) -> None:
    monkeypatch.setenv("VIT_REF_CACHE_LIMIT", "much")
    ended = invoke(*arguments)
    line = "vit-ref: VIT_REF_CACHE_LIMIT is 'much': give a size, such as 16GiB or 500MB\n"
    assert (ended.exit_code, ended.stdout, ended.stderr) == (2, "", line)
    assert len(store.entries()) == 3
    assert not (store.root / "limit").exists()


def test_without_a_home_directory_it_asks_for_a_directory(monkeypatch) -> None:
    for name in ("VIT_REF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "relative")
    ended = invoke()
    line = "vit-ref: there is no home directory, so there is no cache: name a directory in VIT_REF_CACHE\n"
    assert (ended.exit_code, ended.stderr) == (2, line)


@pytest.mark.parametrize("option", ["--cache", "--no-cache"])
@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        (session, "check_port", ["verify", "anywhere"]),
        (stream, "check_streamed", ["verify", "anywhere", "--stream"]),
        (pairs, "compare", ["compare", "a", "b"]),
    ],
)
def test_the_option_reaches_the_check(monkeypatch, module, function, arguments, option) -> None:
    given: list[dict[str, Any]] = []

    def check(*_: Any, **options: Any) -> Any:
        given.append(options)
        return REPORTS["right"]()

    monkeypatch.setattr(module, function, check)
    assert CliRunner().invoke(main, [*arguments, option]).exit_code == 0
    assert given[0]["cache"] is (option == "--cache")
