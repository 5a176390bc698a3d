"""Is a checkpoint on the hub found by every form of its name, and does a verdict name the bytes that it is about?"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

import vit_ref
from vit_ref.errors import CheckpointError
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import Case
from vit_ref.verify.stream import check_streamed
from vit_ref.weights import checkpoint, hub, writing
from vit_ref.weights.hub import Name
from vit_ref.weights.origin import find_origin

CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=1,
    intermediate_size=7,
    image_size=8,
    patch_size=4,
    num_labels=3,
)
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a/b", Name("a/b")),
        ("a/b@main", Name("a/b", "main")),
        ("a/b@refs/pr/3", Name("a/b", "refs/pr/3")),
        ("https://huggingface.co/a/b", Name("a/b")),
        ("https://www.huggingface.co/a/b/", Name("a/b")),
        ("https://hf.co/a/b", Name("a/b")),
        ("https://huggingface.co/a/b/tree/v1.0", Name("a/b", "v1.0")),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F3", Name("a/b", "refs/pr/3")),
        ("https://huggingface.co/a/b/commit/0123abc", Name("a/b", "0123abc")),
    ],
)
def test_a_name_is_a_repository_and_perhaps_a_revision(name: str, found: Name) -> None:
    assert hub.parse_name(name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./a/b", "./a/b: no such directory or file"),
        ("a/b@", "a/b@: no such directory or file"),
        ("a/b@x y", "a/b@x y: no such directory or file"),
        (
            "https://huggingface.co/datasets/a/b",
            "it is not the URL of a model repository: give a directory, a hub id, or",
        ),
        ("https://huggingface.co/a", "it is not the URL of a model repository"),
        ("https://huggingface.co/a/b/tree/main/folder", "it is not the URL of a model repository"),
        ("https://example.com/a/b", "it is not the URL of a model repository"),
        ("gs://bucket/a/b", "it is not the URL of a model repository"),
    ],
)
def test_what_is_no_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        vit_ref.from_pretrained(name)
    assert message in str(caught.value) and str(caught.value).startswith(name)


def test_two_revisions_are_one_too_many(tmp_path: Path) -> None:
    for ask in (vit_ref.from_pretrained, partial(vit_ref.check_port, None), check_streamed):
        with pytest.raises(CheckpointError, match=r"^a/b@x: it names revision 'x', and revision is 'y': give one$"):
            ask("a/b@x", revision="y")
    with pytest.raises(CheckpointError, match=r": it is no hub id, so it has no revision 'y': leave revision out$"):
        vit_ref.from_pretrained(tmp_path, revision="y")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache without a network, with two commits of someone/vit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--vit"
    for seed, (name, commit) in enumerate({"v1": OLD, "main": NEW}.items()):
        source = Case("cached", CONFIG, seed=seed).checkpoint()
        writing.write_directory(repository / "snapshots" / commit, source.tensors, CONFIG.to_hf())
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("name", "revision", "commit"),
    [
        ("someone/vit", None, NEW),
        ("someone/vit", "v1", OLD),
        ("someone/vit@v1", None, OLD),
        (f"someone/vit@{OLD}", None, OLD),
        ("https://huggingface.co/someone/vit/tree/v1", None, OLD),
        ("someone/vit@v1", "v1", OLD),
    ],
)
def test_the_revision_that_is_asked_for_is_read(name: str, revision: str | None, commit: str, cached: Path) -> None:
    assert checkpoint.read(name, revision=revision).path == cached / commit
    model = vit_ref.from_pretrained(name, revision=revision)
    meant = vit_ref.from_pretrained(cached / commit)
    assert (model.cls_token[...] == meant.cls_token[...]).all()


def test_a_revision_that_the_cache_has_not_is_named(cached: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^someone/vit@v2: no such directory exists\. As a hub id it is not in "):
        vit_ref.from_pretrained("someone/vit@v2")


def sha256(*files: Path) -> str:
    """Returns the digest that a shell prints: `sha256sum` of one file, `sha256sum FILES | sha256sum` of several."""
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def test_a_checkpoint_of_the_hub_is_named_by_its_commit(cached: Path) -> None:
    found = find_origin(checkpoint.read("someone/vit@v1"))
    assert found.name == f"someone/vit@{OLD[:7]}" and found.revision == OLD
    assert found.sha256 == sha256(cached / OLD / checkpoint.WEIGHTS)
    assert found.sha256 != find_origin(checkpoint.read("someone/vit")).sha256
    assert found.said == f"sha256 {found.sha256}, commit {OLD}"


def test_neighbours_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Case("neighbour", CONFIG).checkpoint()
    for name in ("a", "b"):
        writing.write_directory(tmp_path / name / "model", source.tensors, CONFIG.to_hf())
    names = [find_origin(checkpoint.read(tmp_path / name / "model")).name for name in ("a", "b")]
    assert names == ["a/model", "b/model"]
    monkeypatch.chdir(tmp_path / "a" / "model")
    found = find_origin(checkpoint.read("."))
    assert (found.name, found.path, found.revision) == ("a/model", str(tmp_path / "a" / "model"), None)
    assert find_origin(checkpoint.read(checkpoint.WEIGHTS)).name == f"model/{checkpoint.WEIGHTS}"


@pytest.mark.parametrize("lazy", [False, True])
def test_shards_have_one_digest_together(lazy: bool, tmp_path: Path) -> None:
    source = Case("shards", CONFIG).checkpoint()
    writing.write_directory(tmp_path, source.tensors, CONFIG.to_hf(), max_shard_size=900)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert find_origin(checkpoint.read(tmp_path, lazy=lazy)).sha256 == sha256(*shards)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    source = Case("gone", CONFIG).checkpoint()
    writing.write_directory(tmp_path, source.tensors, CONFIG.to_hf())
    found = checkpoint.read(tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it cannot be read any more \(No such file or dir"):
        find_origin(found)


def test_an_error_that_nobody_foresaw_is_no_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> list[str]:
        raise RuntimeError("a fault of the client's own")

    monkeypatch.setattr("huggingface_hub.list_repo_files", broken)
    with pytest.raises(RuntimeError, match="a fault of the client's own"):
        checkpoint.locate("somebody/vit")


def test_a_refusal_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> list[str]:
        raise HfHubHTTPError("401 Client Error\nat length")

    monkeypatch.setattr("huggingface_hub.list_repo_files", refusing)
    with pytest.raises(CheckpointError, match=r"^somebody/vit: .*As a hub id it was refused: 401 Client Error: corr"):
        checkpoint.locate("somebody/vit")
