"""Does the store give back what was written, and nothing else, whatever happened to its files or its writers?"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_ref.errors import InputError
from vit_ref.verify.cache.place import DEFAULT_LIMIT, find_place, parse_size, show_size
from vit_ref.verify.cache.store import Store

ONE, OTHER = "1" * 64, "2" * 64
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def files(store: Store) -> list[Path]:
    return sorted((store.root / "entries").iterdir())


def test_what_was_written_is_read(store) -> None:
    store.write("errors", ONE, [CONTENT[:100], memoryview(CONTENT)[100:]])
    assert bytes(store.read("errors", ONE) or b"") == CONTENT
    assert bytes(Store(store.root).read("errors", ONE) or b"") == CONTENT
    assert store.read("errors", OTHER) is None
    assert store.read("facts", ONE) is None


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# Of the seal, the digest, the content's first byte, one inside, and its last.
@pytest.mark.parametrize("place", [0, 15, 16, 47, 48, 5000, -1])
def test_a_flipped_bit_is_noticed(store, place: int) -> None:
    store.write("errors", ONE, [CONTENT])
    flip(*files(store), place)
    assert store.read("errors", ONE) is None
    assert files(store) == []  # so that it is written again


@pytest.mark.parametrize("length", [0, 15, 16, 48, 1000, 48 + len(CONTENT) - 1])
def test_a_cut_entry_is_noticed(store, length: int) -> None:
    store.write("errors", ONE, [CONTENT])
    os.truncate(*files(store), length)
    assert store.read("errors", ONE) is None


def test_a_longer_entry_is_noticed(store) -> None:
    store.write("errors", ONE, [CONTENT])
    (path,) = files(store)
    path.write_bytes(path.read_bytes() + b"\0")
    assert store.read("errors", ONE) is None


@pytest.mark.parametrize("size", [1, 2**22 - 1, 2**22, 2**22 + 1, 2**24 + 5])
def test_content_of_several_chunks(store, size: int) -> None:
    content = os.urandom(size)
    store.write("errors", ONE, [content[: size // 3], content[size // 3 :]])
    assert bytes(store.read("errors", ONE) or b"") == content
    (path,) = files(store)
    flip(path, 48 + size - 1)
    assert store.read("errors", ONE) is None


def test_swapped_chunks_are_noticed(store) -> None:
    first, second = os.urandom(2**22), os.urandom(2**22)
    store.write("errors", ONE, [first, second])
    (path,) = files(store)
    path.write_bytes(path.read_bytes()[:48] + second + first)
    assert store.read("errors", ONE) is None


@pytest.mark.parametrize("name", [f"errors-{OTHER}", f"facts-{ONE}"])
def test_an_entry_under_another_name_is_noticed(store, name: str) -> None:
    store.write("errors", ONE, [CONTENT])
    (path,) = files(store)
    path.rename(path.with_name(name))
    kind, _, key = name.partition("-")
    assert store.read(kind, key) is None


def test_a_killed_writer_leaves_no_entry(store) -> None:
    # The kill comes when all parts are written, and the file still has its temporary name.
    program = (
        "import pathlib, sys\n"
        "import vit_ref.verify.cache.store as module\n"
        "store = module.Store(pathlib.Path(sys.argv[1]))\n"
        "replace = module.os.replace\n"
        "def waiting(*paths):\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    replace(*paths)\n"
        "module.os.replace = waiting\n"
        f"store.write('errors', '{ONE}', [bytes(2000)])\n"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    (left,) = files(store)
    assert store.read("errors", ONE) is None
    assert store.entries() == []
    store.trim()
    assert files(store) == [left]  # it may be a writer's that is at work
    os.utime(left, (time.time() - 7200,) * 2)
    store.trim()
    assert files(store) == []


def test_several_processes_write_and_read_at_once(store) -> None:
    program = (
        "import pathlib, sys\n"
        "from vit_ref.verify.cache.store import Store\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "store._limit = 62_000\n"  # so small that each removes what the others have just written
        "for k in range(200):\n"
        "    key = f'{k % 7:064x}'\n"
        "    found = store.read('errors', key)\n"
        "    assert found is None or bytes(found) == bytes([k % 7]) * 10_000\n"
        "    store.write('errors', key, [bytes([k % 7]) * 10_000])\n"
        "assert store._writes\n"
    )
    commands = [[sys.executable, "-c", program, str(store.root)]] * 3
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for each in running:
        _, errors = each.communicate()
        assert (each.returncode, errors) == (0, "")
    assert not [file for file in files(store) if file.name.startswith("writing-")]


def test_the_least_recently_used_goes_first(store, monkeypatch) -> None:
    monkeypatch.setenv("VIT_REF_CACHE_LIMIT", "64KB")
    keys = [f"{k:064x}" for k in range(7)]
    for k, key in enumerate(keys[:6]):
        store.write("errors", key, [CONTENT])
        os.utime(store.root / "entries" / f"errors-{key}", (1000 + k,) * 2)
    assert store.read("errors", keys[0]) is not None  # now it was used last
    store.write("errors", keys[6], [CONTENT])
    assert [store.read("errors", key) is not None for key in keys] == [True, False, *[True] * 5]
    assert sum(entry.size for entry in store.entries()) <= store.limit


def test_an_entry_that_takes_a_large_part_of_the_bound_is_not_written(store, monkeypatch) -> None:
    monkeypatch.setenv("VIT_REF_CACHE_LIMIT", "60KB")
    store.write("errors", ONE, [CONTENT])
    assert files(store) == []


def test_the_bound_is_the_environments_or_the_written_one_or_the_default(store, monkeypatch) -> None:
    assert store.limit == DEFAULT_LIMIT
    store.set_limit(7_000_000)
    assert store.limit == Store(store.root).limit == 7_000_000
    monkeypatch.setenv("VIT_REF_CACHE_LIMIT", "1.5GiB")
    assert Store(store.root).limit == 3 * 2**29
    monkeypatch.setenv("VIT_REF_CACHE_LIMIT", "much")
    with pytest.raises(InputError, match="VIT_REF_CACHE_LIMIT is 'much': give a size, such as 16GiB"):
        _ = Store(store.root).limit


@pytest.mark.parametrize("content", [b"ten users", b"\xff", b""])
def test_a_file_that_is_not_the_caches_keeps_its_content(store, content: bytes) -> None:
    (store.root / "limit").write_bytes(content)
    with pytest.raises(InputError, match=r"/limit: it holds no size, so it is not of the cache: move it"):
        store.set_limit(7_000_000)
    assert (store.root / "limit").read_bytes() == content
    assert store.limit == DEFAULT_LIMIT


def test_a_bound_is_not_written_through_a_link(store, tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("12\n")
    (store.root / "limit").symlink_to(mine)
    store.set_limit(7_000_000)
    assert (mine.read_text(), Store(store.root).limit) == ("12\n", 7_000_000)


def test_a_bound_is_written_whole_or_not_at_all(store, monkeypatch) -> None:
    store.set_limit(0)

    tried: list[str] = []

    def full(source: str, target: Path) -> None:
        tried.append(target.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_ref.verify.cache.store.os.replace", full)
    with pytest.raises(InputError, match="the bound cannot be written there"):
        store.set_limit(7_000_000)
    assert Store(store.root).limit == 0
    assert sorted(file.name for file in store.root.iterdir()) == ["entries", "limit"]


def test_clear_removes_only_what_is_its_own(store) -> None:
    store.write("errors", ONE, [CONTENT])
    store.write("facts", ONE, [b"0"])
    mine = store.root / "mine"
    beside = [store.root / "entries" / name for name in ("errors-mine", "writing-a-book", "writing-notes.md")]
    left = store.root / "entries" / "writing-a1b2c3_4"
    for file in (mine, *beside, left):
        file.write_text("kept")
        os.utime(file, (time.time() - 7200,) * 2)
    store.trim()
    assert not left.exists()
    left.write_text("")
    assert store.clear() == (2, 2 * 48 + len(CONTENT) + 1)
    assert files(store) == beside
    assert mine.exists()


def test_a_place_that_cannot_be_made_is_one_note(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache")
    store.write("errors", ONE, [CONTENT])
    assert store.read("errors", ONE) is None
    assert (store.entries(), store.clear()) == ([], (0, 0))
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "/cache: the cache cannot be used (Not a directory): name another directory in VIT_REF_CACHE. This run goes on"
        " without it"
    )


def test_a_full_disk_is_one_note(store, monkeypatch, caplog) -> None:
    store.write("errors", ONE, [CONTENT])

    tried: list[str] = []

    def full(source: str, target: Path) -> None:
        tried.append(target.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_ref.verify.cache.store.os.replace", full)
    store.write("errors", OTHER, [CONTENT])
    store.write("facts", OTHER, [CONTENT])
    store.note("another fault")
    assert tried == [f"errors-{OTHER}"]
    assert [file.name for file in files(store)] == [f"errors-{ONE}"]
    assert bytes(store.read("errors", ONE) or b"") == CONTENT
    (record,) = caplog.records
    assert "nothing more is written to the cache (No space left on device)" in record.getMessage()


def test_the_directory_of_entries_is_its_users_alone(store) -> None:
    assert (store.root / "entries").stat().st_mode & 0o077 == 0


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path, caplog) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries").chmod(0o777)
    store = Store(tmp_path)
    store.write("errors", ONE, [CONTENT])
    assert list((tmp_path / "entries").iterdir()) == []
    assert "others may write there" in caplog.text


def test_a_directory_of_another_user_is_not_used(store, monkeypatch, caplog) -> None:
    store.write("errors", ONE, [CONTENT])
    monkeypatch.setattr("vit_ref.verify.cache.store.os.geteuid", lambda: os.getuid() + 1)
    assert Store(store.root).read("errors", ONE) is None
    assert "it belongs to another user" in caplog.text


def test_the_place(monkeypatch, tmp_path) -> None:
    def place(**variables: str) -> Path | None:
        for name in ("VIT_REF_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place()

    monkeypatch.setenv("HOME", str(tmp_path))
    assert place() == tmp_path / ".cache" / "vit-ref"
    assert place(XDG_CACHE_HOME="relative") == tmp_path / ".cache" / "vit-ref"
    assert place(XDG_CACHE_HOME="/x") == Path("/x/vit-ref")
    assert place(XDG_CACHE_HOME="/x", VIT_REF_CACHE="/y") == Path("/y")
    assert place(VIT_REF_CACHE="~/z") == tmp_path / "z"
    assert place(VIT_REF_CACHE="off") is None
    with pytest.raises(InputError, match="VIT_REF_CACHE is '~nobody-here/c', and there is no such home directory"):
        place(VIT_REF_CACHE="~nobody-here/c")


def test_without_a_home_directory_there_is_no_cache_unless_one_is_named(monkeypatch) -> None:
    def absent(user: int) -> None:
        raise KeyError(user)

    for name in ("HOME", "VIT_REF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", absent)
    assert find_place() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert find_place() == Path("/x/vit-ref")
    monkeypatch.setenv("VIT_REF_CACHE", "~/c")
    with pytest.raises(InputError, match="there is no such home directory: give the path"):
        find_place()


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("500MB", 5 * 10**8), ("500 mb", 5 * 10**8), ("12", 12), ("1.5KiB", 1536)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--limit") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 potatoes", "1e9", pytest.param("9" * 400, id="400 digits")])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="give a size"):
        parse_size(text, "--limit")


def test_sizes_in_words() -> None:
    assert [show_size(size) for size in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
