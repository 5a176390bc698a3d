"""One of two processes with four simulated devices each, which load, run, differentiate and save a model together.

It is a program of its own: `python -m tests.sharding.processes CHECKPOINT DIRECTORY COORDINATOR NUMBER`. The first
process writes the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vit_ref
from tests.sharding.ways import CASE
from vit_ref.verify.compare.backward import truths_of
from vit_ref.verify.compare.objectives import objectives_for
from vit_ref.verify.gates import errors_of
from vit_ref.weights import writing
from vit_ref.weights.checkpoint import CheckpointError
from vit_ref.weights.pretrained import get_arrays


def observed(model: vit_ref.VisionTransformer, images: Any) -> dict[str, jax.Array]:
    """Returns the logits, and the gradient of the loss for each parameter, in float64."""
    graph, state = nnx.split(model)
    labels = objectives_for((CASE.batch, CASE.config.num_labels))[0].labels

    @jax.jit
    def run(state: nnx.State, images: jax.Array) -> tuple[jax.Array, nnx.State]:
        def loss(state: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graph, state)(images)
            return -jax.nn.log_softmax(logits)[np.arange(CASE.batch), labels].mean(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(state)
        return logits, gradients

    logits, gradients = run(jax.tree.map(lambda x: x.astype(np.float64), state), images)
    return {"logits": logits, **get_arrays(gradients)}


def _fails_to_save(model: vit_ref.VisionTransformer, out: Path, when: str) -> str:
    """Returns the error if the first process cannot write anything or the second of three files, or fails otherwise."""
    (out / "a-file").touch()
    write, files = writing.write_safetensors, 0

    def full(file: Path, tensors: Any) -> None:
        nonlocal files
        files += 1
        if files == 2:
            raise OSError("the disk is full") if when == "between" else RuntimeError("nobody foresaw this")
        write(file, tensors)

    with mock.patch.object(writing, "write_safetensors", full):
        try:
            where = out / ("a-file/below" if when == "before" else "full")
            vit_ref.save_pretrained(model, where, max_shard_size="100KB")
        except (CheckpointError, RuntimeError) as error:
            return str(error)
    return "no error"


def main(directory: Path, out: Path, coordinator: str, number: int) -> None:
    jax.distributed.initialize(coordinator, 2, number)
    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    model = vit_ref.from_pretrained(directory, dtype=np.float64, mesh=mesh, sharding="fsdp+tensor")
    vit_ref.save_pretrained(model, out / f"process-{number}", max_shard_size="100KB")
    failing_saves = {name: _fails_to_save(model, out, name) for name in ("before", "between", "unforeseen")}
    (out / f"failing-{number}.json").write_text(json.dumps(failing_saves), encoding="utf-8")
    images = CASE.images().astype(np.float64)
    divided = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.make_array_from_callback(images.shape, divided, lambda index: images[index])
    together = {
        name: np.asarray(multihost_utils.process_allgather(value, tiled=True))
        for name, value in observed(model, batch).items()
    }
    if number:
        return
    alone = observed(vit_ref.from_pretrained(directory, dtype=np.float64), images)
    # The scale of a gradient is that of its layer, because the gradient of a key's bias is only rounding.
    errors = errors_of(together, truths_of({name: np.asarray(value) for name, value in alone.items()}))
    spans = [path for path, array in get_arrays(nnx.state(model)).items() if not array.is_fully_replicated]
    found = {
        "devices": [jax.local_device_count(), jax.device_count()],
        "divided": spans,
        "errors": {name: [each.rms, each.max] for name, each in errors.items()},
    }
    (out / "processes.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
