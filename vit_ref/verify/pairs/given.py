"""The inputs of a comparison: from a file, random in given shapes, or from the reference's own function."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CandidateError, InputError, first_line
from vit_ref.verify.candidates.declaration import Candidate
from vit_ref.verify.candidates.feeding import cast_floats
from vit_ref.verify.candidates.loading import RAISED, beside_it

Given = Mapping[str, Any] | str | os.PathLike[str] | None


def find_inputs(reference: Candidate, given: Given, seed: int = 0) -> dict[str, NDArray]:
    """Returns the inputs for both sides, with floats in float32.

    Args:
      reference: the declaration. Its `inputs` makes them if `given` is None.
      given: arrays by name, or the path of an `.npz` file that holds them.
      seed: the argument of `Reference.inputs`.

    Raises:
      InputError: there are no inputs, or they cannot be used.
    """
    if isinstance(given, Mapping):
        where, arrays = "inputs", dict(given)
    elif isinstance(given, (str, os.PathLike)):
        where, arrays = str(given), _read(Path(given))
    elif given is None:
        where, arrays = f"{reference.name}: inputs({seed})", _made(reference, seed)
    else:
        raise InputError(f"inputs is a {type(given).__name__}: give a mapping from names to arrays, or an .npz file")
    if not arrays:
        raise InputError(f"{where}: it has no array: give at least one by name")
    found = {str(name): _array(value, f"{where}: {name!r}") for name, value in arrays.items()}
    for name, value in found.items():
        if value.dtype.kind not in "fiub":
            raise InputError(f"{where}: {name!r} has dtype {value.dtype}: give floats, integers or booleans")
        if not value.size:
            raise InputError(f"{where}: {name!r} has shape {value.shape}, so it is empty: give it at least one element")
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise InputError(f"{where}: {name!r} has NaN in it: give numbers")
    if not next(iter(found.values())).ndim:
        raise InputError(f"{where}: {next(iter(found))!r} is a single number: give it an axis for the batch")
    if given is not None and getattr(reference, "inputs", None) and reference.adapt is None and len(found) == 1:
        # It is the first argument whatever its name is, and reports would show that name.
        declared: list[str] = []
        with contextlib.suppress(CandidateError):  # its own data may not be here, which is why others are given
            declared = [str(name) for name in _made(reference, seed)]
        if len(declared) == 1 and declared != list(found):
            raise InputError(f"{where}: {next(iter(found))!r} is no input of {reference.name}: name it {declared[0]!r}")
    with np.errstate(over="ignore"):
        cast = cast_floats(found)
    for name, value in cast.items():
        if value.dtype.kind == "f" and (np.isinf(value) & np.isfinite(found[name])).any():
            raise InputError(f"{where}: {name!r} has numbers too large for float32: give smaller ones")
    return cast


def random_inputs(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, NDArray]:
    """Returns normal random numbers in the given shapes.

    Raises:
      InputError: they do not fit into memory.
    """
    rng = np.random.default_rng(seed)
    try:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    except (MemoryError, ValueError) as error:
        raise InputError(
            f"inputs of the shapes {shapes} cannot be made ({first_line(error)}): make them smaller"
        ) from None


def _array(value: Any, what: str) -> NDArray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} is no array ({first_line(error)}): give a NumPy array") from None


def _read(path: Path) -> dict[str, NDArray]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: name one that np.savez wrote")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise InputError(f"{path}: it holds an array without a name: give it one with np.savez(FILE, NAME=array)")
        with loaded as file:
            return {name: file[name] for name in file.files}
    except InputError:
        raise
    # The last two: a compressed member that is damaged, and one that is encrypted.
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(f"{path}: it cannot be read ({first_line(error)}): write it with np.savez") from None


def _made(reference: Candidate, seed: int) -> dict[str, Any]:
    make = getattr(reference, "inputs", None)
    if make is None:
        raise InputError(
            f"{reference.name}: it declares no inputs: use vit_ref.Reference(inputs=FUNCTION), or give --inputs"
            " FILE.npz, or --shape NAME=2,3,4"
        )
    try:
        with beside_it(reference.directory):
            made = make(seed)
    except RAISED as error:
        raise CandidateError.raised(reference.name, f"inputs({seed})", error) from error
    if not isinstance(made, Mapping):
        raise InputError(
            f"{reference.name}: inputs({seed}) returned a {type(made).__name__}: return a mapping from names to arrays"
        )
    return dict(made)
