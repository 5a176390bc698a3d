"""Checkpoints as files: found, read and written whole or not at all. What the tensors mean is `mapping`'s business.

Formats: safetensors (also sharded, with an index), flax msgpack, npz. Pickle is refused: unpickling runs whatever code
the file holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import operator
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import ml_dtypes
import msgpack
import numpy as np
import safetensors
from flax import serialization, traverse_util
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import load_file

from vit_ref.errors import CheckpointError
from vit_ref.weights import hub
from vit_ref.weights.stored_dtypes import require_readable
from vit_ref.weights.wrappers import find_wrapper, is_state

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
FLAX_WEIGHTS = "flax_model.msgpack"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
_LOG = logging.getLogger("vit_ref")
_STORED = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLE_REFUSAL = "is a pickle, which can run code when read: convert it to safetensors first"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it stands in its files.

    Attributes:
      path: the directory or file that it was read from.
      tensors: by name, in the file's dtypes; names of nested trees are joined with "/". A `LazyTensors` where they were
        to be read one by one.
      config: `config.json`, or None where a lone file has none beside it.
      preprocessor: `preprocessor_config.json`, or None.
      files: those that hold the tensors, sorted by name; none of a checkpoint that was made in memory.
    """

    path: Path
    tensors: Mapping[str, NDArray]
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()


class LazyTensors(Mapping[str, NDArray]):
    """Tensors of safetensors files, read each time they are asked for, and kept by nobody here.

    Args:
      files: the files, whose headers are read and checked now.

    Raises:
      CheckpointError: a file is missing, damaged or truncated; also when a tensor is read.
    """

    def __init__(self, *files: Path):
        # By name: the file, and the tensor's name in it.
        self._stored: dict[str, tuple[Path, str]] = {}
        for file in files:
            require_readable(file)
            with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
                self._stored |= {name: (file, name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """Some of these tensors under other names, new name -> name here."""
        view = LazyTensors()
        view._stored = {new: self._stored[name] for new, name in names.items()}
        return view

    def __getitem__(self, name: str) -> NDArray:
        """The tensor, in the file's dtype."""
        file, inner = self._stored[name]
        with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
            return stored.get_tensor(inner)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; a mapping's own way is to read it."""
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._stored)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without its values."""
        file, inner = self._stored[name]
        with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
            return tuple(stored.get_slice(inner).get_shape())


def rename_tensors(tensors: Mapping[str, NDArray], names: Mapping[str, str]) -> Mapping[str, NDArray]:
    """Some of these tensors under other names, new name -> name in `tensors`; of `LazyTensors` nothing is read."""
    if isinstance(tensors, LazyTensors):
        return tensors.renamed(names)
    return {new: tensors[name] for new, name in names.items()}


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


def locate(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory or file of a checkpoint, fetched from the Hugging Face hub where the name is one of its.

    Args:
      path_or_hub_id: a directory, a file, or whatever `hub.parse_name` takes.
      revision: see `hub.fetch`.

    Raises:
      CheckpointError: there is no such directory or file, and no such repository on the hub, or no way to it.
    """
    name = os.fspath(path_or_hub_id)
    if not name:
        raise CheckpointError("the checkpoint's name is empty: give a directory or a hub id")
    if os.path.exists(name):  # unlike Path.exists, it takes a name that is too long for a file
        if revision is not None:
            raise CheckpointError(f"{name}: is no hub id, so it has no revision {revision!r}: leave revision out")
        return Path(name)
    return hub.fetch(hub.parse_name(name, revision), _wanted)


def _wanted(name: str, files: Iterable[str] | None) -> list[str]:
    """The files to fetch from a repository of the hub: the configuration, and the weights in one format.

    Args:
      name: the repository, for a message.
      files: what it has; None where that is not known, and all that the cache has is taken.
    """
    if files is None:
        return [CONFIG, PREPROCESSOR, WEIGHTS, INDEX, SHARDS, FLAX_WEIGHTS]
    files = set(files)
    for found, weights in ((WEIGHTS, [WEIGHTS]), (INDEX, [INDEX, SHARDS]), (FLAX_WEIGHTS, [FLAX_WEIGHTS])):
        if found in files:
            return [CONFIG, PREPROCESSOR, *weights]
    pickles = sorted(file for file in files if file.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(f"{name}/{pickles[0]}: {_PICKLE_REFUSAL}")
    raise CheckpointError(f"{name}: no weights: expected {WEIGHTS}, {INDEX} or {FLAX_WEIGHTS}")


def read(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    lazy: bool = False,
    ignore: Iterable[str] = (),
) -> Checkpoint:
    """Reads a checkpoint: a Hugging Face directory, a hub id, or a `.safetensors`, `.msgpack` or `.npz` file.

    One prefix that all names have in common is stripped, and the logger "vit_ref" says so; see `wrappers`.

    Args:
      path_or_hub_id: which.
      revision: see `hub.fetch`.
      lazy: read headers only, and each tensor when it is asked for. Of safetensors; other files are read whole.
      ignore: names or patterns of tensors that the caller will leave behind; they need not have the prefix.

    Raises:
      CheckpointError: it cannot be found, is damaged, is a pickle, or lacks its config.
    """
    path = locate(path_or_hub_id, revision)
    directory = path.parent if path.is_file() else path
    config = _read_json(directory / CONFIG, required=path.is_dir())
    preprocessor = _read_json(directory / PREPROCESSOR, required=False)
    reader = _read_lazily if lazy else read_tensors
    tensors, files = (reader(path), (path,)) if path.is_file() else _read_directory(path, reader)
    return Checkpoint(path, _unwrapped(tensors, path, tuple(ignore)), config, preprocessor, files)


def _unwrapped(tensors: Mapping[str, NDArray], path: Path, ignore: tuple[str, ...]) -> Mapping[str, NDArray]:
    """The weights under the names that they have without what a training loop puts before them all."""
    left_behind = {name for name in tensors if any(fnmatchcase(name, pattern) for pattern in ignore)}
    prefix, weights = find_wrapper(name for name in tensors if name not in left_behind)
    if not prefix:
        return tensors
    state = len(tensors) - len(left_behind) - len(weights)
    beside = f", and {state} tensors of training state beside them are left behind" if state else ""
    _LOG.warning("%s: all weights' names begin with %r, which is stripped%s", path, prefix, beside)
    # Those to be left behind stay until it is seen that every pattern names one.
    kept = [name for name in tensors if name.startswith(prefix) or name in left_behind]
    return rename_tensors(tensors, {name.removeprefix(prefix): name for name in kept})


def read_tensors(file: Path) -> dict[str, NDArray]:
    """All tensors of one file, by name.

    Raises:
      CheckpointError: the file is missing, damaged, of an unknown kind, or a pickle.
    """
    if file.suffix in _PICKLES:
        raise CheckpointError(f"{file}: {_PICKLE_REFUSAL}")
    readers: dict[str, Callable[[Path], dict[str, NDArray]]] = {
        ".safetensors": _read_safetensors,
        ".msgpack": _read_msgpack,
        ".npz": _read_npz,
    }
    if file.suffix not in readers:
        raise CheckpointError(f"{file}: unknown kind of file: give one of {', '.join(readers)}")
    with _damage_of(file):
        return readers[file.suffix](file)


def _read_lazily(file: Path) -> Mapping[str, NDArray]:
    return LazyTensors(file) if file.suffix == ".safetensors" else read_tensors(file)


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Makes whatever readers raise of a damaged file one line."""
    damage = (
        safetensors.SafetensorError,
        msgpack.exceptions.UnpackException,
        zipfile.BadZipFile,
        zlib.error,
        # zipfile on an encrypted member, and on a version or a compression that it has not
        RuntimeError,
        NotImplementedError,
        # numpy on a member that is a pickle or cut short, msgpack on an inconsistent tree
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        OSError,
        # numpy on the name of a dtype that is none
        SyntaxError,
    )
    if os.path.isdir(file):  # unlike Path.is_dir, it takes a name that is too long
        raise CheckpointError(f"{file}: is a directory, and was to be a file of weights")
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, PermissionError):
        # safetensors finds no file wherever it cannot open one.
        if os.path.exists(file):
            reason = "may not be read: change its permissions"
        else:
            reason = "a link to no file: fetch it again" if os.path.islink(file) else "no such file"
        raise CheckpointError(f"{file}: {reason}") from None
    except MemoryError as error:
        raise CheckpointError(f"{file}: does not fit in memory, or is damaged ({str(error).strip()})") from None
    except damage as error:
        raise CheckpointError(f"{file}: damaged or truncated, fetch it again ({str(error).strip()})") from None


def _read_directory(
    path: Path, reader: Callable[[Path], Mapping[str, NDArray]]
) -> tuple[Mapping[str, NDArray], tuple[Path, ...]]:
    """The tensors, and the files that they stand in."""
    if (path / WEIGHTS).exists():
        return reader(path / WEIGHTS), (path / WEIGHTS,)
    if (path / INDEX).exists():
        return _read_shards(path, reader)
    if (path / FLAX_WEIGHTS).exists():
        return reader(path / FLAX_WEIGHTS), (path / FLAX_WEIGHTS,)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(f"{path / pickles[0]}: {_PICKLE_REFUSAL}")
    raise CheckpointError(f"{path}: no weights: expected {WEIGHTS}, {INDEX} or {FLAX_WEIGHTS}")


def _read_shards(
    path: Path, reader: Callable[[Path], Mapping[str, NDArray]]
) -> tuple[Mapping[str, NDArray], tuple[Path, ...]]:
    index = _read_json(path / INDEX, required=True) or {}
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{path / INDEX}: no weight_map from tensors to files")
    shards: dict[str, Mapping[str, NDArray]] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path / INDEX}: {shard!r} is not a file name beside the index")
        shards[shard] = reader(path / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if shards[shard].keys() != listed:
            names = ", ".join(sorted(shards[shard].keys() ^ listed))
            raise CheckpointError(f"{path / shard}: the index and the file disagree on {names}")
    files = tuple(path / shard for shard in shards)
    if all(isinstance(tensors, LazyTensors) for tensors in shards.values()):
        return LazyTensors(*files), files
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}, files


def _read_safetensors(file: Path) -> dict[str, NDArray]:
    require_readable(file)
    return load_file(file)


def _read_msgpack(file: Path) -> dict[str, NDArray]:
    tree = serialization.msgpack_restore(file.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError("not a tree of parameters")
    return _arrays(traverse_util.flatten_dict(tree, sep="/"))


def _read_npz(file: Path) -> dict[str, NDArray]:
    # Opened here, because np.load leaves a damaged file open.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        tensors = _arrays({name: archive[name] for name in archive.files})
    # numpy has no name for bfloat16 and writes two bytes of "void" in its place.
    return {name: value.view(ml_dtypes.bfloat16) if value.dtype == "V2" else value for name, value in tensors.items()}


def _arrays(found: dict[str, Any]) -> dict[str, NDArray]:
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    # flax keeps a training loop's step as a number.
    odd = [name for name in found.keys() - arrays.keys() if not is_state(name)]
    if odd:
        raise ValueError(f"{min(odd)} is not an array")
    return arrays


def _number(digits: str) -> int | float:
    """An integer; a float where it has not 64 bits, which whoever uses it can say something about."""
    return int(digits) if len(digits) <= 18 else float(digits)


def _read_json(file: Path, *, required: bool) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_int=_number)
    except FileNotFoundError:
        if not required:
            return None
        raise CheckpointError(f"{file.parent}: no {file.name} in this directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


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
