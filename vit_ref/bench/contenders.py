"""The implementations to time: this package's model, FlaxViT, and transformers' ViT in PyTorch.

All get the same images. In a training step they have the same optimizer, AdamW on every parameter, and the loss in
float32. Parameters are random, because their values do not change the cost of a step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vit_ref.bench.compiling import Cost, compile_twice
from vit_ref.bench.queueing import queue_passes
from vit_ref.bench.workload import Workload
from vit_ref.errors import InputError
from vit_ref.finetune.step import split_step
from vit_ref.model.attention import cudnn, require_cudnn
from vit_ref.model.skeleton import skeleton
from vit_ref.verify.references.flax_vit import require_flaxvit

RATE = 1e-4


# Parts of the messages of the allocators of XLA and PyTorch.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory")


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether an exception of Python, XLA or PyTorch means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


class Contender(NamedTuple):
    """Implementation that is compiled and warm.

    Attributes:
      name: name in tables.
      run: function that runs a number of forward passes or training steps, by default one, and returns when the device
        has finished. A training step continues from the one before.
      cost: cost of the preparation.
    """

    name: str
    run: Callable[..., Any]
    cost: Cost


class Entry(NamedTuple):
    """Entry of the table of implementations.

    Attributes:
      build: prepares the implementation for a workload.
      require: raises `InputError` if its packages or its device are missing.
      refusal: returns why it cannot run a workload and what to do, or "" if it can.
    """

    build: Callable[[Workload], Contender]
    require: Callable[[], None] = lambda: None
    refusal: Callable[[Workload], str] = lambda workload: ""

    def installed(self) -> bool:
        """Tells whether its packages and its device are available."""
        try:
            self.require()
        except InputError:
            return False
        return True


def torchvit(workload: Workload, *, compiles: bool) -> Contender:
    """Prepares transformers' ViT in PyTorch, eager or with `torch.compile`."""
    from vit_ref.bench.torch_vit import build

    run, first = build(workload, RATE, compiles=compiles)
    return Contender("torch.compile" if compiles else "PyTorch", run, Cost(first))


def vit_ref(workload: Workload, *, fused: bool = False) -> Contender:
    """Prepares this package's model and training step. Model and optimizer are split once, and donated.

    Args:
      workload: the workload.
      fused: whether attention is `attention.cudnn`, as PyTorch has its own fused attention.
    """
    name = "vit_ref-cudnn" if fused else "vit_ref"
    graph, shapes = skeleton(workload.config, workload.numerics.dtype, cudnn if fused else None)
    parameters = _random(shapes)
    pixels, labels = map(jax.device_put, workload.inputs())
    if workload.what == "forward":

        def forward(state: nnx.State, pixels: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(pixels)

        return _forward(name, forward, parameters, pixels)
    model = nnx.merge(graph, parameters)
    model.train()
    whole, state = nnx.split((model, nnx.Optimizer(model, optax.adamw(RATE), wrt=nnx.Param)))
    return _stepping(name, partial(split_step, whole), state, pixels, labels)


def flaxvit(workload: Workload) -> Contender:
    """Prepares the module of `FlaxViTForImageClassification`, trained as its documentation shows."""
    import transformers
    from transformers.models.vit import modeling_flax_vit

    transformers.logging.set_verbosity_error()
    config = transformers.ViTConfig(**workload.config.hf_numerics())
    dtype: Any = workload.numerics.dtype
    module: Any = modeling_flax_vit.FlaxViTForImageClassificationModule(config, dtype=dtype)
    pixels, labels = map(jax.device_put, workload.inputs())
    parameters = _random(jax.eval_shape(module.init, jax.random.key(0), pixels[:1])["params"])

    def forward(parameters: Any, pixels: jax.Array) -> jax.Array:
        return module.apply({"params": parameters}, pixels).logits

    if workload.what == "forward":
        return _forward("FlaxViT", forward, parameters, pixels)
    optimizer = optax.adamw(RATE)

    def loss_of(parameters: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(parameters, pixels).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state: Any, pixels: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        parameters, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(parameters, pixels, labels)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), loss

    return _stepping("FlaxViT", step, (parameters, optimizer.init(parameters)), pixels, labels)


def _require_torch() -> None:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"PyTorch's ViT needs {' and '.join(missing)}: pip install 'vit-ref[suite,torch]'")


def _not_in_float32(workload: Workload) -> str:
    half = workload.numerics.dtype != np.float32
    return "" if half else "cuDNN's attention takes half precision: give --precision mixed"


CONTENDERS: dict[str, Entry] = {
    "vit_ref": Entry(vit_ref),
    "vit_ref-cudnn": Entry(partial(vit_ref, fused=True), require_cudnn, _not_in_float32),
    "FlaxViT": Entry(flaxvit, require_flaxvit),
    "PyTorch": Entry(partial(torchvit, compiles=False), _require_torch),
    "torch.compile": Entry(partial(torchvit, compiles=True), _require_torch),
}


def _random(shapes: Any) -> Any:
    """Replaces the shapes of a tree by small random arrays of the same dtypes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, dtype=np.float32) / 50, leaf.dtype), shapes
    )


def chain_steps(step: Callable[..., Any], state: Any, pixels: jax.Array, labels: jax.Array) -> Callable[..., Any]:
    """Returns a function for `queue_passes` whose steps continue from the last one. It returns the state and the loss.

    Args:
      step: (state, pixels, labels) -> (state, loss). It may overwrite the state.
      state: the first state.
      pixels: images (B, height, width, C), the same at every step.
      labels: class ids (B,), the same at every step.
    """

    def launch() -> tuple[Any, jax.Array]:
        nonlocal state
        state, loss = step(state, pixels, labels)
        return state, loss

    return queue_passes(launch)


def _forward(name: str, forward: Callable[..., jax.Array], parameters: Any, pixels: jax.Array) -> Contender:
    call, cost = compile_twice(forward, parameters, pixels)
    return _warm(name, queue_passes(lambda: call(parameters, pixels)), cost)


def _stepping(name: str, step: Callable[..., Any], state: Any, pixels: jax.Array, labels: jax.Array) -> Contender:
    call, cost = compile_twice(step, state, pixels, labels, donate=(0,))
    return _warm(name, chain_steps(call, state, pixels, labels), cost)


def _warm(name: str, run: Callable[..., Any], cost: Cost) -> Contender:
    run()
    return Contender(name, run, cost)
