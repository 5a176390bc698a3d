"""The part of the cache that belongs to one reference with its weights: its errors and its values.

Errors are kept as JSON, which gives back each float as it was. Values are kept as their bytes, after a list of names,
dtypes and shapes. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.cache.identity import digest, digest_arrays, surroundings
from vit_ref.verify.cache.originals import find_replaced
from vit_ref.verify.cache.store import Store
from vit_ref.verify.compare.inputs import Inputs
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.gates import Error, Errors
from vit_ref.verify.precision import Precision

# Each array begins at a multiple of this many bytes.
_ALIGNED = 64


class Shelf:
    """Entries of one reference on one device.

    Args:
      store: the store.
      identity: a digest of all that the values depend on, but what `within` and `what` say.
      foreign: whether a candidate of others is loaded in this run, see `originals.find_replaced`.
      around: the digest of the surroundings in `identity`; None if they are not in it.
    """

    def __init__(self, store: Store, identity: str, *, foreign: bool = True, around: str | None = None):
        self._store, self._identity = store, identity
        self._foreign, self._around = foreign, around

    @classmethod
    def of(
        cls, store: Store, reference: str, config: Any, tensors: dict[str, NDArray], *, foreign: bool = True
    ) -> Shelf:
        """Returns the shelf of a reference that is chosen by name.

        Args:
          store: the store.
          reference: the reference's name.
          config: the configuration, as JSON takes it.
          tensors: the tensors that the reference is filled with.
          foreign: see the class.
        """
        around = digest(surroundings())
        return cls(store, digest(reference, config, digest_arrays(tensors), around), foreign=foreign, around=around)

    def within(self, *more: Any) -> Shelf:
        """Returns a shelf for narrower circumstances, which JSON can hold."""
        return Shelf(self._store, digest(self._identity, *more), foreign=self._foreign, around=self._around)

    def for_inputs(self, inputs: Inputs, precision: Precision) -> Shelf:
        """Returns the shelf for these inputs and this precision."""
        named = inputs if isinstance(inputs, dict) else {"": np.asarray(inputs)}
        return self.within(digest_arrays(named), [str(part) for part in precision])

    def find(self, what: str) -> Errors | None:
        """Implements `Kept.find`."""
        found = self._store.read("errors", digest(self._identity, what))
        if found is None:
            return None
        return {name: Error(*values) for name, values in json.loads(bytes(found)).items()}

    def keep(self, what: str, errors: Errors) -> None:
        """Implements `Kept.keep`."""
        self._write("errors", what, [json.dumps(errors).encode()])

    def find_fact(self, what: str) -> Any:
        """Returns a value that JSON can hold, or None."""
        found = self._store.read("facts", digest(self._identity, what))
        return None if found is None else json.loads(bytes(found))

    def keep_fact(self, what: str, value: Any) -> None:
        """Keeps a value that JSON can hold."""
        self._write("facts", what, [json.dumps(value).encode()])

    def forget_trace(self, what: str) -> None:
        """Removes an entry of values."""
        self._store.remove("traces", digest(self._identity, what))

    def has_trace(self, what: str) -> bool:
        """Says whether there is an entry of values, damaged or not."""
        return self._store.has("traces", digest(self._identity, what))

    def find_trace(self, what: str) -> Trace | None:
        """Returns values by name, or None."""
        found = self._store.read("traces", digest(self._identity, what))
        if found is None:
            return None
        length = int.from_bytes(found[:8], "little")
        start, trace = _aligned(8 + length), {}
        for name, dtype, shape, axes in json.loads(bytes(found[8 : 8 + length])):
            size = np.dtype(dtype).itemsize * math.prod(shape)
            stored = np.frombuffer(found[start : start + size], dtype).reshape(shape)
            trace[name] = stored.transpose(np.argsort(axes))
            start = _aligned(start + size)
        return trace

    def keep_trace(self, what: str, trace: Trace) -> None:
        """Keeps values by name. Their dtypes are those of NumPy itself.

        A value keeps the order of its axes in memory, because NumPy sums in that order. The last bits of its errors
        would differ otherwise.
        """
        described, arrays = [], []
        for name, value in trace.items():
            axes = sorted(range(value.ndim), key=lambda axis: -abs(value.strides[axis]))
            # An array of no dimension would get one.
            stored = np.ascontiguousarray(value.transpose(axes)).reshape([value.shape[axis] for axis in axes])
            described.append((name, stored.dtype.str, stored.shape, axes))
            arrays.append(stored)
        header = json.dumps(described).encode()
        parts: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header, _filling(8 + len(header))]
        for stored in arrays:
            parts += [stored.reshape(-1).view(np.uint8).data, _filling(stored.nbytes)]
        self._write("traces", what, parts)

    def _write(self, kind: str, what: str, parts: list[bytes | memoryview]) -> None:
        # A candidate may change what other packages compute, and with it the reference of this run, but of no other.
        replaced = find_replaced(foreign=self._foreign)
        if not replaced and self._around is not None and self._around != digest(surroundings()):
            replaced = "a setting of jax or of the environment"
        if replaced:
            self._store.note(
                f"{replaced} changed in this run, or the candidate imported it, so the cache keeps no result of the"
                " reference"
            )
            return
        self._store.write(kind, digest(self._identity, what), parts)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNED) * _ALIGNED


def _filling(length: int) -> bytes:
    return bytes(_aligned(length) - length)
