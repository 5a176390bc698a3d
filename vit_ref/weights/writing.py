"""Checkpoints written: a whole directory or nothing, and one tensor at a time in memory."""

from __future__ import annotations

import json
import math
import operator
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import ml_dtypes
import numpy as np
from flax import serialization, traverse_util
from numpy.typing import DTypeLike, NDArray

from vit_ref.errors import CheckpointError
from vit_ref.weights.checkpoint import CONFIG, FLAX_WEIGHTS, INDEX, PREPROCESSOR, SHARDS, WEIGHTS

_STORED = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
}


class Deferred(NamedTuple):
    """A tensor to be written that is made when its turn comes, and held no longer.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      make: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], NDArray]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray:
        """Makes it."""
        return self.make()


def write_directory(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, NDArray | Deferred],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a Hugging Face directory.

    Everything is written under temporary names first and then renamed, the config last: each file appears whole, and a
    save that fails while writing changes nothing. Weights of an earlier save are removed after that.

    Args:
      directory: made where it does not exist; other files in it stay.
      tensors: by name. Of those that are deferred one at a time is made.
      config: becomes `config.json`.
      preprocessor: becomes `preprocessor_config.json`, where given. Else one that is there stays, with a warning: it
        may have been put there for this model, or be left from another.
      max_shard_size: larger weights are split, in bytes or as "5GB".

    Raises:
      CheckpointError: the directory cannot be written.
    """
    directory = Path(directory)
    if preprocessor is None and (directory / PREPROCESSOR).exists():
        warnings.warn(
            f"{directory / PREPROCESSOR} stays, and images will be preprocessed by it, though the model that is saved"
            " brings none: remove it unless it is meant for it",
            stacklevel=3,
        )
    split = _split(tensors, max_shard_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as stage:
            for file, names in split.filename_to_tensors.items():
                write_safetensors(Path(stage, file), {name: tensors[name] for name in names})
            if split.is_sharded:
                write_json(Path(stage, INDEX), {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
            if preprocessor is not None:
                write_json(Path(stage, PREPROCESSOR), preprocessor)
            write_json(Path(stage, CONFIG), config)
            written = sorted((file.name for file in Path(stage).iterdir()), key=lambda name: name == CONFIG)
            for name in written:
                os.replace(Path(stage, name), directory / name)
        # Weights of an earlier save, in whichever format, would be read in place of these by some reader.
        earlier = [directory / WEIGHTS, directory / INDEX, directory / FLAX_WEIGHTS, *directory.glob(SHARDS)]
        for superseded in earlier:
            if superseded.name not in written:
                superseded.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error})") from None


def order_names(tensors: Mapping[str, NDArray | Deferred], max_shard_size: int | str) -> list[str]:
    """The names, in the order in which `write_directory` makes these tensors.

    Raises:
      CheckpointError: no file may be of that size.
    """
    files = _split(tensors, max_shard_size).filename_to_tensors.values()
    return [name for names in files for name in _as_stored({name: tensors[name] for name in names})]


def _split(tensors: Mapping[str, NDArray | Deferred], max_shard_size: int | str) -> huggingface_hub.StateDictSplit:
    size = _shard_size(max_shard_size)
    try:
        return huggingface_hub.split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=size,
        )
    except ValueError as error:
        raise CheckpointError(f"max_shard_size is {max_shard_size!r}: {error}") from None


def _shard_size(given: Any) -> int | str:
    """A size as huggingface_hub reads it; zero and negative ones, which it would take, are refused."""
    whole = hasattr(given, "__index__") and not isinstance(given, bool)
    size = operator.index(given) if whole else given
    text = isinstance(size, str) and re.search("[1-9]", size) and not size.strip().startswith("-")
    if not (text or (whole and size > 0)):
        raise CheckpointError(f"max_shard_size is {given!r}: give a whole number of bytes, or a size such as '5GB'")
    return size


def _as_stored(tensors: Mapping[str, NDArray | Deferred]) -> list[str]:
    # The widest first, then by name, so that each is aligned. Of two widths alike bfloat16 comes first there.
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, _STORED[tensors[name].dtype], name))


def write_safetensors(file: Path, tensors: Mapping[str, NDArray | Deferred]) -> None:
    """Writes the bytes that safetensors' own `save_file` does, which wants all tensors at once.

    The format (https://huggingface.co/docs/safetensors) is the header's length, the header, the tensors without gaps.

    Raises:
      OSError: it cannot be written.
    """
    names = _as_stored(tensors)
    # transformers refuses a safetensors file that does not say which framework's names it holds.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _STORED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            # numpy has no buffer of bfloat16.
            stream.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def write_tensors(file: Path, tensors: Mapping[str, NDArray]) -> None:
    """Writes one `.npz` or `.msgpack` file, which `read_tensors` reads; names become a tree at each "/" in the latter.

    Raises:
      OSError: it cannot be written.
    """
    if file.suffix == ".npz":
        np.savez(file, allow_pickle=False, **tensors)
    else:
        file.write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(dict(tensors), sep="/")))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object for people to read, too."""
    # Half a surrogate pair, which JSON may escape, is no UTF-8: it stays escaped.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
