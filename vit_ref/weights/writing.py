"""Writing of checkpoints: a whole directory or nothing, with one tensor at a time in memory."""

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

# Every dtype that the readers accept, in the order in which safetensors writes tensors: the widest first, so that each
# tensor is aligned. Weights have floats, but other tensors of a checkpoint may have any of these.
_STORED = {
    np.dtype(np.uint64): "U64",
    np.dtype(np.int64): "I64",
    np.dtype(np.float64): "F64",
    np.dtype(np.complex64): "C64",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int32): "I32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint16): "U16",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}


class Deferred(NamedTuple):
    """A tensor that the writer makes when it writes it, and does not keep.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      make: returns its values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], NDArray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray:
        """Makes the tensor."""
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

    It writes every file under a temporary name, then renames all, the configuration last. So each file appears whole,
    and an error while writing changes nothing. Then it removes weights of an earlier save.

    Args:
      directory: made if it does not exist. Its other files stay.
      tensors: by name. Those that are `Deferred` are made one at a time.
      config: content of `config.json`.
      preprocessor: content of `preprocessor_config.json`. If it is None, an existing file stays, with a warning:
        somebody may have put it there for this model, or it may be left from another.
      max_shard_size: largest size of a file, in bytes or as "5GB". Larger weights are split into several files.

    Raises:
      CheckpointError: the directory cannot be written to, or `max_shard_size` is no size.
    """
    directory = Path(directory)
    if preprocessor is None and (directory / PREPROCESSOR).exists():
        warnings.warn(
            f"{directory / PREPROCESSOR}: the model has no preprocessing of its own, so this file stays and its"
            " images will be preprocessed by it: remove the file unless it belongs to the model",
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
        # Some readers would read an earlier save's weights in place of these, whatever their format.
        earlier = [directory / WEIGHTS, directory / INDEX, directory / FLAX_WEIGHTS, *directory.glob(SHARDS)]
        for superseded in earlier:
            if superseded.name not in written:
                superseded.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: it cannot be written ({error}): give another place") from None


def order_names(tensors: Mapping[str, NDArray | Deferred], max_shard_size: int | str) -> list[str]:
    """Returns the names in the order in which `write_directory` makes these tensors.

    Raises:
      CheckpointError: `max_shard_size` is no size.
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
    """Returns a size in a form that huggingface_hub reads. Refuses zero and negative sizes, which it would take."""
    whole = hasattr(given, "__index__") and not isinstance(given, bool)
    size = operator.index(given) if whole else given
    text = isinstance(size, str) and re.search("[1-9]", size) and not size.strip().startswith("-")
    if not (text or (whole and size > 0)):
        raise CheckpointError(f"max_shard_size is {given!r}: give a whole number of bytes, or a size such as '5GB'")
    return size


def _as_stored(tensors: Mapping[str, NDArray | Deferred]) -> list[str]:
    order = list(_STORED)
    return sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))


def write_safetensors(file: Path, tensors: Mapping[str, NDArray | Deferred]) -> None:
    """Writes the same bytes as safetensors' own `save_file`, which needs all tensors in memory at once.

    The format (https://huggingface.co/docs/safetensors) is the header's length, the header, and the tensors without
    gaps.

    Raises:
      OSError: the file cannot be written.
    """
    names = _as_stored(tensors)
    # transformers refuses a safetensors file that does not name the framework of its tensors.
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
            # NumPy offers no buffer for bfloat16.
            stream.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def write_tensors(file: Path, tensors: Mapping[str, NDArray]) -> None:
    """Writes one `.npz` or `.msgpack` file, which `read_tensors` reads. In the latter each "/" in a name makes a tree.

    Raises:
      OSError: the file cannot be written.
    """
    if file.suffix == ".npz":
        np.savez(file, allow_pickle=False, **tensors)
    else:
        file.write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(dict(tensors), sep="/")))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON, which people can read too."""
    # JSON may escape half a surrogate pair. UTF-8 cannot hold it, so it stays escaped.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
