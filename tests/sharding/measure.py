"""On eight simulated devices, loads, runs, differentiates and saves a model in every way, and writes its results.

It is a program of its own, because the number of devices is settled when jax starts:
`python -m tests.sharding.measure CHECKPOINT DIRECTORY`.
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from numpy.typing import NDArray

import vit_ref
from tests.sharding.ways import CASE, JUDGED, WAYS, Way, digests
from vit_ref.model.skeleton import skeleton
from vit_ref.model.vit import Tap
from vit_ref.verify.candidates.own import OwnCandidate
from vit_ref.verify.candidates.tapped import Forward
from vit_ref.verify.gates import error, numerical_gate
from vit_ref.verify.precision import FLOAT64
from vit_ref.verify.results import ParityReport
from vit_ref.verify.session import Session
from vit_ref.weights import checkpoint, tensor_files
from vit_ref.weights.checkpoint import Checkpoint
from vit_ref.weights.pretrained import get_arrays


class OneDevice(OwnCandidate):
    """The model on one device, as the reference of the others."""

    name = "one device"
    foreign = False

    def __init__(self, source: Checkpoint):
        super().__init__(CASE.config, source)


class Sharded(OwnCandidate):
    """The model on a mesh, with the batch divided over the axis "data"."""

    name = "sharded"

    def __init__(self, source: Checkpoint, model: vit_ref.VisionTransformer, mesh: Mesh):
        super().__init__(CASE.config, source)
        self._state, self._images = nnx.state(model), NamedSharding(mesh, PartitionSpec("data"))

    def ready(self, dtype: DTypeLike) -> tuple[Any, Forward]:
        graph, _ = skeleton(CASE.config, dtype)
        # In the form that differentiation gives them.
        state = jax.tree.map(lambda x: jnp.asarray(x, np.promote_types(dtype, np.float32)), self._state)
        before, after = get_arrays(self._state), get_arrays(state)
        moved = [
            path
            for path in before
            if not after[path].sharding.is_equivalent_to(before[path].sharding, after[path].ndim)
        ]
        assert not moved, moved

        def forward(state: nnx.State, pixels: jax.Array, tap: Tap) -> jax.Array:
            return nnx.merge(graph, state)(jax.lax.with_sharding_constraint(pixels, self._images), tap=tap)

        return state, forward


class Watched(tensor_files.LazyTensors):
    """Tensors that count their reads, and record what the devices hold meanwhile."""

    def __init__(self, *files: Path):
        super().__init__(*files)
        Watched.last, self.asked, self.alive, self.most = self, Counter[str](), 0, 0

    def __getitem__(self, name: str) -> NDArray:
        tensor = super().__getitem__(name)
        self.asked[name] += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._died)
        return tensor

    def _died(self) -> None:
        self.alive -= 1


def held() -> Counter[int]:
    """Returns the bytes of all live arrays, by device."""
    found = Counter[int]()
    for array in jax.live_arrays():
        # To read the shards of an array would make arrays, which would be counted, too.
        part = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.addressable_devices:
            found[device.id] += part
    return found


def loaded(directory: Path, mesh: Mesh, way: Way) -> tuple[vit_ref.VisionTransformer, dict[str, Any]]:
    """Loads the model onto its mesh, and returns it with the host's reads and the devices' memory meanwhile."""
    gc.collect()
    before, peak, placed = held(), Counter[int](), []
    make = jax.make_array_from_callback

    def watched(shape: tuple[int, ...], sharding: NamedSharding, callback: Callable[..., NDArray]) -> jax.Array:
        nonlocal peak
        largest = 0

        def asked(index: Any) -> NDArray:
            nonlocal largest, peak
            part = callback(index)
            largest = max(largest, part.nbytes)
            peak |= held() - before
            return part

        array = make(shape, sharding, asked)
        peak |= held() - before
        placed.append((list(shape), largest))
        return array

    with (
        mock.patch.object(jax, "make_array_from_callback", watched),
        mock.patch.object(checkpoint, "LazyTensors", Watched),
        mock.patch.object(tensor_files, "LazyTensors", Watched),
    ):
        model = vit_ref.from_pretrained(directory, mesh=mesh, sharding=way.sharding)
    peak |= held() - before
    arrays = get_arrays(nnx.state(model))
    return model, {
        "asked": Watched.last.asked,
        "alive": Watched.last.most,
        "placed": placed,
        "peak": [peak[device.id] for device in jax.devices()],
        "shards": {
            path: [[list(shard.data.shape), shard.data.nbytes] for shard in array.addressable_shards]
            for path, array in arrays.items()
        },
    }


def observed(report: ParityReport) -> dict[str, Any]:
    """Returns the numbers of a report by site or gradient: both errors in float64, the error in float32, its gate."""
    sites = {each.site: [each.exact.rms, each.exact.max, each.rounding, each.gate] for each in report.results}
    return {"unobserved": report.unobserved, "sites": sites}


def communication(text: str) -> Counter[str]:
    """Counts how often a compiled program communicates, by operation."""
    return Counter(re.findall(rf"= [^=]*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def as_users_run_it(model: vit_ref.VisionTransformer, pixels: Any) -> tuple[NDArray, str]:
    """Returns logits without a tap, and the compiled program."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, pixels: nnx.merge(graph, state)(pixels)).lower(state, pixels).compile()
    return np.asarray(compiled(state, pixels)), compiled.as_text() or ""


def main(directory: Path, out: Path) -> None:
    source, images = checkpoint.read(directory), CASE.images()
    one_device = OneDevice(source)
    alone = vit_ref.from_pretrained(directory)
    own_logits, _ = as_users_run_it(alone, images)
    truth = one_device.trace(images, FLOAT64)["logits"]
    own = error(own_logits, truth, carriers=True)
    vit_ref.save_pretrained(alone, out / "one", max_shard_size="100KB")
    found: dict[str, Any] = {"one": digests(out / "one")}
    models = {}
    for name, way in WAYS.items():
        mesh = Mesh(np.array(jax.devices()).reshape(way.data, way.model), ("data", "model"))
        models[name], load = loaded(directory, mesh, way)
        vit_ref.save_pretrained(models[name], out / name, max_shard_size="100KB")
        found[name] = {"load": load, "saved": digests(out / name)}

    def measure_way(name: str) -> None:
        model = models[name]
        mesh = model.norm.scale[...].sharding.mesh
        logits, program = as_users_run_it(model, jax.device_put(images, NamedSharding(mesh, PartitionSpec("data"))))
        found[name] |= {
            "communication": communication(program),
            "logits": [error(logits, truth).rms, numerical_gate(own.rms, np.float32, own.carriers)],
        }
        if name == JUDGED:
            candidate = Sharded(source, model, mesh)
            session = Session(CASE.config, source, images, candidate, np.float32, one_device, title=name)
            found[name] |= {
                "forward": observed(session.forward()),
                "backward": observed(session.backward()),
            }

    # One way is traced while another is compiled.
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(measure_way, WAYS))
    (out / "measured.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
