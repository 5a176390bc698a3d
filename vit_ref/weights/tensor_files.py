"""Files of tensors, read whole or tensor by tensor: safetensors, flax msgpack, npz.

Pickle is refused: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import safetensors
from flax import serialization, traverse_util
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vit_ref.errors import CheckpointError
from vit_ref.weights.stored_dtypes import require_readable
from vit_ref.weights.wrappers import is_state

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PICKLE_REFUSAL = "is a pickle, which can run code when read: convert it to safetensors first"


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


def read_tensors(file: Path) -> dict[str, NDArray]:
    """All tensors of one file, by name.

    Raises:
      CheckpointError: the file is missing, damaged, of an unknown kind, or a pickle.
    """
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file}: {PICKLE_REFUSAL}")
    readers: dict[str, Callable[[Path], dict[str, NDArray]]] = {
        ".safetensors": _read_safetensors,
        ".msgpack": _read_msgpack,
        ".npz": _read_npz,
    }
    if file.suffix not in readers:
        raise CheckpointError(f"{file}: unknown kind of file: give one of {', '.join(readers)}")
    with _damage_of(file):
        return readers[file.suffix](file)


def read_lazily(file: Path) -> Mapping[str, NDArray]:
    """Tensors of one file, each read when it is asked for if the file is safetensors."""
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
