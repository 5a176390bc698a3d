"""Many devices: where parameters and images lie on a `jax.sharding` mesh. Everything else is the compiler's."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from vit_ref.errors import InputError

Sharding = Literal["data", "fsdp"]
AXIS = "data"
# A smaller parameter costs more to gather than to keep whole: all biases, norms and heads of a few classes.
_LEAST = 2**12


def mesh_for(batch_size: int) -> Mesh:
    """All devices of all processes in one row, over which a batch is divided.

    Raises:
      InputError: the batch cannot be divided evenly.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(f"batch_size is {batch_size}: give a multiple of the {len(devices)} devices")
    return Mesh(np.array(devices), (AXIS,))


def shardings(state: Any, mesh: Mesh, kind: Sharding) -> Any:
    """Where each array of a tree lies.

    Args:
      state: a tree of arrays or of their shapes: parameters, and an optimizer's moments, which are as large.
      mesh: from `mesh_for`.
      kind: "data": every device has all of it. "fsdp": large arrays are divided over the devices along the longest
        axis that they divide evenly (Zhao et al. 2023, https://arxiv.org/abs/2304.11277, as XLA does it).

    Returns:
      A tree of `NamedSharding`.
    """

    def spec(leaf: Any) -> PartitionSpec:
        if kind == "data" or leaf.size < _LEAST:
            return PartitionSpec()
        fitting = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if not fitting:
            return PartitionSpec()
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*(AXIS if axis == longest else None for axis in range(leaf.ndim)))

    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def divided(batch: NDArray, mesh: Mesh) -> jax.Array:
    """This process's part of a batch, as its part of the one array that all processes share."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(AXIS)), batch)
