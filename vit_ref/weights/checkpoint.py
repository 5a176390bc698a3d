"""Reading of checkpoints, from a directory, a file or the hub. The module `mapping` knows what the tensors mean."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vit_ref.errors import CheckpointError
from vit_ref.weights import hub
from vit_ref.weights.tensor_files import (
    PICKLE_REFUSAL,
    PICKLES,
    LazyTensors,
    read_lazily,
    read_tensors,
    rename_tensors,
)
from vit_ref.weights.wrappers import find_wrapper

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
FLAX_WEIGHTS = "flax_model.msgpack"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
_LOG = logging.getLogger("vit_ref")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint's files.

    Attributes:
      path: the directory or file that it was read from.
      tensors: by name, in the file's dtypes. Names of nested trees are joined with "/". A `LazyTensors` if the caller
        reads them one by one.
      config: `config.json`, or None if a lone file has none beside it.
      preprocessor: `preprocessor_config.json`, or None.
      files: those that hold the tensors, sorted by name. Empty if the checkpoint was made in memory.
      prefix: what the files have before each name, see `wrappers`; "" for nothing.
    """

    path: Path
    tensors: Mapping[str, NDArray]
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()
    prefix: str = ""


def locate(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the local directory or file of a checkpoint, after fetching it from the hub if it is not here.

    Args:
      path_or_hub_id: a directory, a file, or a name that `hub.parse_name` takes.
      revision: a branch, a tag or a commit on the hub; None for the newest commit of the main branch.

    Raises:
      CheckpointError: there is no such directory, file or repository on the hub, or the hub cannot be reached.
    """
    name = os.fspath(path_or_hub_id)
    if not name:
        raise CheckpointError("the checkpoint's name is empty: give a directory or a hub id")
    if os.path.exists(name):  # Path.exists raises an error if the name is too long for a file.
        if revision is not None:
            raise CheckpointError(f"{name}: it is no hub id, so it has no revision {revision!r}: leave revision out")
        return Path(name)
    return hub.fetch(hub.parse_name(name, revision), _wanted)


def _wanted(name: str, files: Iterable[str] | None) -> list[str]:
    """Returns the files to fetch from a repository of the hub: the configuration, and the weights in one format.

    Args:
      name: the repository, for a message.
      files: its files. None if they are not known: the cache is then searched for every format.
    """
    if files is None:
        return [CONFIG, PREPROCESSOR, WEIGHTS, INDEX, SHARDS, FLAX_WEIGHTS]
    files = set(files)
    for found, weights in ((WEIGHTS, [WEIGHTS]), (INDEX, [INDEX, SHARDS]), (FLAX_WEIGHTS, [FLAX_WEIGHTS])):
        if found in files:
            return [CONFIG, PREPROCESSOR, *weights]
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles:
        raise CheckpointError(f"{name}/{pickles[0]}: {PICKLE_REFUSAL}")
    raise CheckpointError(f"{name}: it has no weights: give a repository with {WEIGHTS}, {INDEX} or {FLAX_WEIGHTS}")


def read(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    lazy: bool = False,
    ignore: Iterable[str] = (),
) -> Checkpoint:
    """Reads a checkpoint: a Hugging Face directory, a hub id, or a `.safetensors`, `.msgpack` or `.npz` file.

    If all names share one of the prefixes in `wrappers`, it is removed, and the logger "vit_ref" warns of it.

    Args:
      path_or_hub_id: the checkpoint.
      revision: a branch, a tag or a commit on the hub; None for the newest commit of the main branch.
      lazy: whether to read the headers now and each tensor on access. It applies to safetensors. Other files are read
        whole.
      ignore: names or patterns of tensors that the caller will leave out. They need not have the prefix.

    Raises:
      CheckpointError: the checkpoint is not found, is damaged, is a pickle, or has no configuration.
    """
    path = locate(path_or_hub_id, revision)
    directory = path.parent if path.is_file() else path
    config = _read_json(directory / CONFIG, required=path.is_dir())
    preprocessor = _read_json(directory / PREPROCESSOR, required=False)
    reader = read_lazily if lazy else read_tensors
    tensors, files = (reader(path), (path,)) if path.is_file() else _read_directory(path, reader)
    prefix, tensors = _unwrapped(tensors, path, tuple(ignore))
    return Checkpoint(path, tensors, config, preprocessor, files, prefix)


def _unwrapped(
    tensors: Mapping[str, NDArray], path: Path, ignore: tuple[str, ...]
) -> tuple[str, Mapping[str, NDArray]]:
    """Returns the prefix that a training loop puts before all names, and the weights under their names without it."""
    ignored = {name for name in tensors if any(fnmatchcase(name, pattern) for pattern in ignore)}
    prefix, weights = find_wrapper(name for name in tensors if name not in ignored)
    if not prefix:
        return "", tensors
    state = len(tensors) - len(ignored) - len(weights)
    beside = f", and {state} tensors of training state are left out" if state else ""
    _LOG.warning("%s: all weights' names begin with %r, which is removed%s", path, prefix, beside)
    # The ignored tensors stay, because the caller checks that every pattern names one.
    kept = [name for name in tensors if name.startswith(prefix) or name in ignored]
    return prefix, rename_tensors(tensors, {name.removeprefix(prefix): name for name in kept})


def _read_directory(
    path: Path, reader: Callable[[Path], Mapping[str, NDArray]]
) -> tuple[Mapping[str, NDArray], tuple[Path, ...]]:
    """Returns the tensors, and the files that hold them."""
    if (path / WEIGHTS).exists():
        return reader(path / WEIGHTS), (path / WEIGHTS,)
    if (path / INDEX).exists():
        return _read_shards(path, reader)
    if (path / FLAX_WEIGHTS).exists():
        return reader(path / FLAX_WEIGHTS), (path / FLAX_WEIGHTS,)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{path / pickles[0]}: {PICKLE_REFUSAL}")
    raise CheckpointError(f"{path}: it has no weights: give a directory with {WEIGHTS}, {INDEX} or {FLAX_WEIGHTS}")


def _read_shards(
    path: Path, reader: Callable[[Path], Mapping[str, NDArray]]
) -> tuple[Mapping[str, NDArray], tuple[Path, ...]]:
    index = _read_json(path / INDEX, required=True) or {}
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{path / INDEX}: it has no weight_map from tensors to files: save the checkpoint again")
    shards: dict[str, Mapping[str, NDArray]] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{path / INDEX}: {shard!r} is not the name of a file beside the index: save the checkpoint again"
            )
        shards[shard] = reader(path / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if shards[shard].keys() != listed:
            names = ", ".join(sorted(shards[shard].keys() ^ listed))
            raise CheckpointError(f"{path / shard}: the index and the file disagree on {names}: fetch both again")
    files = tuple(path / shard for shard in shards)
    if all(isinstance(tensors, LazyTensors) for tensors in shards.values()):
        return LazyTensors(*files), files
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}, files


def _number(digits: str) -> int | float:
    """Returns an integer, or a float if the number may need more than 64 bits. The field's own check reports it."""
    return int(digits) if len(digits) <= 18 else float(digits)


def _read_json(file: Path, *, required: bool) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_int=_number)
    except FileNotFoundError:
        if not required:
            return None
        raise CheckpointError(f"{file.parent}: it has no {file.name}: fetch the whole checkpoint again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: it cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: it is not a JSON object: fetch it again")
    return content
