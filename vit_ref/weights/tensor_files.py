"""Reading of tensor files, whole or tensor by tensor: safetensors, flax msgpack, npz.

Pickles are refused, because unpickling runs the code in the file.
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
PICKLE_REFUSAL = "it is a pickle, which can run code when read: convert it to safetensors first"


class LazyTensors(Mapping[str, NDArray]):
    """Tensors of safetensors files. Every access reads the tensor from its file, and none is kept in memory.

    Args:
      files: the files. Their headers are read and checked now.

    Raises:
      CheckpointError: a file is missing, damaged or truncated. Every access may raise it too.
    """

    def __init__(self, *files: Path):
        # By name: the file, and the tensor's name in it.
        self._stored: dict[str, tuple[Path, str]] = {}
        for file in files:
            require_readable(file)
            with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
                self._stored |= {name: (file, name) for name in stored.keys()}  # noqa: SIM118  # not a mapping

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """Returns some of these tensors under other names.

        Args:
          names: new name -> present name.
        """
        view = LazyTensors()
        view._stored = {new: self._stored[name] for new, name in names.items()}
        return view

    def __getitem__(self, name: str) -> NDArray:
        """Reads a tensor in the file's dtype."""
        file, inner = self._stored[name]
        with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
            return stored.get_tensor(inner)

    def __contains__(self, name: object) -> bool:
        """Tells whether there is such a tensor. `Mapping` would read it to find out."""
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._stored)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._stored)

    def file_of(self, name: str) -> Path:
        """Returns the file that holds a tensor."""
        return self._stored[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Reads a tensor's shape, and not its values."""
        file, inner = self._stored[name]
        with _damage_of(file), safetensors.safe_open(file, framework="numpy") as stored:
            return tuple(stored.get_slice(inner).get_shape())


def rename_tensors(tensors: Mapping[str, NDArray], names: Mapping[str, str]) -> Mapping[str, NDArray]:
    """Returns some tensors under other names. It reads none of `LazyTensors`.

    Args:
      tensors: by present name.
      names: new name -> present name.
    """
    if isinstance(tensors, LazyTensors):
        return tensors.renamed(names)
    return {new: tensors[name] for new, name in names.items()}


def read_tensors(file: Path) -> dict[str, NDArray]:
    """Reads all tensors of one file.

    Returns:
      Tensors by name, in the file's dtypes.

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
        raise CheckpointError(f"{file}: it is no known kind of file: give one of {', '.join(readers)}")
    with _damage_of(file):
        return readers[file.suffix](file)


def read_lazily(file: Path) -> Mapping[str, NDArray]:
    """Returns tensors of one file by name. Each access reads a tensor if the file is safetensors."""
    return LazyTensors(file) if file.suffix == ".safetensors" else read_tensors(file)


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Turns the errors that readers raise into a `CheckpointError` of one line."""
    damage = (
        safetensors.SafetensorError,
        msgpack.exceptions.UnpackException,
        zipfile.BadZipFile,
        zlib.error,
        # zipfile, for an encrypted member, and for a version or a compression that it does not support
        RuntimeError,
        NotImplementedError,
        # numpy, for a member that is a pickle or truncated; msgpack, for an inconsistent tree
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        OSError,
        # numpy, for a dtype that does not exist
        SyntaxError,
    )
    if os.path.isdir(file):  # Path.is_dir raises an error if the name is too long.
        raise CheckpointError(f"{file}: it is a directory in place of a file of weights: fetch the file again")
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, PermissionError):
        # safetensors reports a missing file also if it may not open the file.
        if os.path.exists(file):
            reason = "this user may not read it: change its permissions"
        else:
            reason = "it is a link to no file: fetch it again" if os.path.islink(file) else "no such file"
        raise CheckpointError(f"{file}: {reason}") from None
    except MemoryError as error:
        raise CheckpointError(
            f"{file}: it does not fit in memory, or is damaged ({str(error).strip()}): free memory, or fetch it again"
        ) from None
    except damage as error:
        raise CheckpointError(f"{file}: it is damaged or truncated ({str(error).strip()}): fetch it again") from None


def _read_safetensors(file: Path) -> dict[str, NDArray]:
    require_readable(file)
    return load_file(file)


def _read_msgpack(file: Path) -> dict[str, NDArray]:
    tree = serialization.msgpack_restore(file.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError("not a tree of parameters")
    return _arrays(traverse_util.flatten_dict(tree, sep="/"))


def _read_npz(file: Path) -> dict[str, NDArray]:
    if not zipfile.is_zipfile(file):
        # np.load would take it for a pickle, and recommend to load it unsafely.
        raise ValueError("not an .npz archive")
    # np.load itself leaves a damaged file open.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        tensors = _arrays({name: archive[name] for name in archive.files})
    # NumPy has no name for bfloat16, and writes it as "void" of two bytes.
    return {name: value.view(ml_dtypes.bfloat16) if value.dtype == "V2" else value for name, value in tensors.items()}


def _arrays(found: dict[str, Any]) -> dict[str, NDArray]:
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    # flax saves a training loop's step as a number.
    odd = [name for name in found.keys() - arrays.keys() if not is_state(name)]
    if odd:
        raise ValueError(f"{min(odd)} is not an array")
    return arrays
