"""Many devices: where parameters and images lie on a `jax.sharding` mesh. Everything else is the compiler's."""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.weights import partition
from vit_ref.weights.partition import DATA
from vit_ref.weights.pretrained import replace_arrays

Sharding = Literal["data", "fsdp"]


def make_mesh(batch_size: int) -> Mesh:
    """All devices of all processes in one row, over which a batch is divided.

    Raises:
      InputError: the batch cannot be divided evenly.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(f"batch_size is {batch_size}: give a multiple of the {len(devices)} devices")
    return Mesh(np.array(devices), (DATA,))


def choose_shardings(state: nnx.State, config: ViTConfig, mesh: Mesh | AbstractMesh, kind: Sharding) -> nnx.State:
    """Where each array of a training state lies, by `vit_ref.weights.partition`.

    Args:
      state: parameters, and an optimizer's moments, each of which lies as the parameter does whose path ends its own.
      config: the model's.
      mesh: from `make_mesh`.
      kind: "data": every device has all of it. "fsdp": large arrays are divided over the devices, where these divide
        the model's width.

    Returns:
      The state with a `NamedSharding` in the place of each array; what belongs to no parameter is on every device.
    """
    placed = partition.choose_shardings(config, mesh, kind, lenient=True)

    def of(path: str) -> NamedSharding:
        parts = path.split(".")
        names = (".".join(parts[k:]) for k in range(len(parts)))
        return next((placed[name] for name in names if name in placed), replicate(mesh))

    paths = (".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
    return replace_arrays(state, {path: of(path) for path in paths})


def replicate(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def divide_batch(batch: NDArray, mesh: Mesh) -> jax.Array:
    """This process's part of a batch, as its part of the one array that all processes share."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(DATA)), batch)
