"""Many devices: the placement of parameters and images on a `jax.sharding` mesh. The compiler does the rest."""

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
    """Returns a mesh of all devices of all processes in one row, over which a batch is divided.

    Args:
      batch_size: images in a batch, over all processes.

    Raises:
      InputError: the devices cannot divide the batch evenly.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(f"batch_size is {batch_size}: give a multiple of {len(devices)}, the number of devices")
    return Mesh(np.array(devices), (DATA,))


def choose_shardings(state: nnx.State, config: ViTConfig, mesh: Mesh | AbstractMesh, kind: Sharding) -> nnx.State:
    """Returns the sharding of each array of a training state, by the rules of `vit_ref.weights.partition`.

    Args:
      state: parameters, and the moments of an optimizer. A moment has the sharding of the parameter whose path ends the
        moment's path.
      config: the model's configuration.
      mesh: the mesh from `make_mesh`.
      kind: "data" puts all of the state on every device. "fsdp" divides large arrays over the devices, if the number of
        devices divides the model's width.

    Returns:
      The state with a `NamedSharding` in place of each array. Arrays of no parameter are on every device.
    """
    placed = partition.choose_shardings(config, mesh, kind, lenient=True)

    def of(path: str) -> NamedSharding:
        parts = path.split(".")
        names = (".".join(parts[k:]) for k in range(len(parts)))
        return next((placed[name] for name in names if name in placed), replicate(mesh))

    paths = (".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
    return replace_arrays(state, {path: of(path) for path in paths})


def replicate(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that puts an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def divide_batch(batch: NDArray, mesh: Mesh) -> jax.Array:
    """Turns this process's part of a batch into its part of one array that all processes share."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(DATA)), batch)
