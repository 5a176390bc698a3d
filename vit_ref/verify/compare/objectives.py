"""Backward passes for any implementation: objectives, and gradients from a perturbation at every site.

Gradients are pulled back from the classification loss and from random cotangents at the output. The loss alone leaves
directions out: its cotangents sum to zero over the classes, and vanish for images of which the model is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import UndifferentiableError
from vit_ref.verify.compare.inputs import is_float
from vit_ref.verify.compare.trace import TappedForward, beside
from vit_ref.verify.precision import Precision

# How many 32nds each objective's inputs are smaller. In this order each of `LOOKS` includes large and small inputs.
#
# Twelve inputs give twelve samples of the rounding error. Its tail is heavy: on a trained ViT-S/14 one pull-back errs
# up to five times as much as the next. That model has 361 gradients. The worst of their pooled errors was 1.8 times the
# reference's (bootstrap over sixteen objectives), and 2.4 times pooled over six objectives.
DARKER = (0, 11, 5, 8, 2, 10, 4, 7, 1, 9, 3, 6)
# So many objectives test the formula in float64: the loss and two random cotangents. A wrong formula shows with any
# random cotangent. Only rounding depends on luck.
SEMANTIC_OBJECTIVES = 3
# After so many objectives `pooling.Pooled.settled` decides whether the rest is likely to change the verdict.
LOOKS = (SEMANTIC_OBJECTIVES, 6, len(DARKER))


class Objective(NamedTuple):
    """A scalar that is differentiated: mean cross-entropy of the output plus its inner product with a cotangent.

    Attributes:
      brightness: factor of the inputs that are floats. It differs, so that each forward pass rounds differently.
      loss_weight: factor of the cross-entropy, which is taken over the output's last axis.
      labels: the labels of the cross-entropy.
      cotangent: array of the output's shape.
      fed: values by site that replace the model's own. Only a part of a model has them.
      pulled: cotangents by site. If there are any, the scalar is only their inner product with the values there.
    """

    brightness: float
    loss_weight: float
    labels: NDArray
    cotangent: NDArray
    fed: Mapping[str, NDArray] = MappingProxyType({})
    pulled: Mapping[str, NDArray] = MappingProxyType({})


class Gradients(NamedTuple):
    """Gradients of one objective.

    Attributes:
      sites: gradients by site, in the site's shape.
      parameters: gradients by the parameters' names in the problem.
      inputs: gradients by name, for inputs that are floats.
    """

    sites: dict[str, NDArray]
    parameters: dict[str, NDArray]
    inputs: dict[str, NDArray]

    def named(self) -> dict[str, NDArray]:
        """Returns all gradients by name, in the order of backpropagation, with parameters after the sites."""
        return {**self.sites, **self.parameters, **self.inputs}


def objectives_for(output: tuple[int, ...], seed: int = 0) -> tuple[Objective, ...]:
    """Returns the objectives: the classification loss on random labels, then random cotangents.

    Args:
      output: the output's shape (B, ..., width).
      seed: seed of the labels and cotangents.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, output[-1], output[:-1])
    first, *others = (1 - darker / 32 for darker in DARKER)
    return Objective(first, 1.0, labels, np.zeros(output)), *(
        Objective(brightness, 0.0, labels, rng.normal(size=output)) for brightness in others
    )


def require_shape(output: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Checks that an output has the shape that an objective needs.

    Args:
      output: the output's shape.
      expected: the shape of the objective's cotangent.

    Raises:
      UndifferentiableError: the shapes differ.
    """
    if tuple(output) != tuple(expected):
        raise UndifferentiableError(
            f"its output has shape {tuple(output)} and not {tuple(expected)}, so its gradients cannot be compared"
        )


def differentiator(
    forward: TappedForward,
    parameters: Any,
    shapes: Mapping[str, tuple[int, ...]],
    inputs: Any,
    precision: Precision,
    *,
    like: Objective | None = None,
    compiled: dict[Any, Future[Any]] | None = None,
) -> Callable[[Objective], tuple[Any, dict[str, NDArray], Any]]:
    """Prepares the differentiation of a forward pass, with a perturbation at every site.

    It traces the pass here, and compiles it in another thread while the caller continues. XLA takes seconds for a real
    model, on one core.

    Args:
      forward: the forward pass. It gets a perturbation of zero at every site whose value has the shape in `shapes`. The
        gradient of that perturbation is the site's gradient.
      parameters: any tree. Parameters that are not stored in the tested precision are widened to at least float32.
      shapes: every site with the shape of its value. The last site is the output.
      inputs: any tree of arrays.
      precision: float64, or the tested precision.
      like: an objective with the same `fed` and `pulled` sites as those to come; by default there are none.
      compiled: compiled functions of earlier calls for the same `forward`. Other parameters can use them too.

    Returns:
      A function that returns the gradients of one objective with respect to parameters, sites and inputs. All
      objectives use the same compiled function. An input that is no float has None in its place.
    """
    compiled = {} if compiled is None else compiled
    like = like or objectives_for(list(shapes.values())[-1])[0]
    dtype = precision.dtype
    wide = np.promote_types(dtype, np.float32)
    structure: Any
    leaves, structure = jax.tree.flatten(inputs)
    shapes_of_inputs = tuple(leaf.shape for leaf in leaves)

    def joined(floats: Sequence[Any], others: Sequence[Any]) -> Any:
        of_floats, of_others = iter(floats), iter(others)
        return structure.unflatten([next(of_floats if is_float(leaf) else of_others) for leaf in leaves])

    def objective(
        parameters: Any,
        perturbations: Any,
        floats: list[jax.Array],
        others: list[jax.Array],
        weight: Any,
        labels: Any,
        cotangent: Any,
        fed: Any,
        pulled: Any,
    ) -> jax.Array:
        products = []

        def tap(site: str, value: jax.Array) -> jax.Array:
            value = fed[site].astype(value.dtype) if site in fed else value
            if value.shape != perturbations[site].shape:
                return value
            value = value + perturbations[site].astype(value.dtype)
            if site in pulled:
                products.append(jnp.sum(pulled[site] * value.astype(wide)))
            return value

        output = forward(parameters, joined([x.astype(dtype) for x in floats], others), tap).astype(wide)
        if pulled:
            return jnp.sum(jnp.stack(products))
        require_shape(output.shape, cotangent.shape)
        log_probs = jax.nn.log_softmax(output)
        loss = -jnp.mean(jnp.take_along_axis(log_probs, labels[..., None], axis=-1))
        return weight * loss + jnp.sum(cotangent * output)

    # Each objective gets its own copy of the parameters, and their gradients reuse its memory. Otherwise reference and
    # candidate would keep four copies, in two dtypes each: gigabytes for a real model.
    @partial(jax.jit, donate_argnums=0)
    def run(parameters: Any, floats: list[jax.Array], *rest: Any) -> Any:
        # As arguments the perturbations would take as much memory as all activations.
        perturbations = {site: jnp.zeros(shape, wide) for site, shape in shapes.items()}
        return jax.grad(objective, argnums=(0, 1, 2))(parameters, perturbations, floats, *rest)

    def arguments(o: Objective) -> tuple[Any, ...]:
        floats = [jnp.asarray(leaf * np.float32(o.brightness), wide) for leaf in leaves if is_float(leaf)]
        others = [jnp.asarray(leaf) for leaf in leaves if not is_float(leaf)]
        ends = [{site: value.astype(wide) for site, value in given.items()} for given in (o.fed, o.pulled)]
        return floats, others, wide.type(o.loss_weight), o.labels.astype(np.int32), o.cotangent.astype(wide), *ends

    def stored(leaf: Any) -> np.dtype:
        return leaf.dtype if leaf.dtype == dtype else wide

    def cast() -> Any:
        return jax.tree.map(lambda leaf: jnp.array(leaf, stored(leaf), copy=True), parameters)

    with precision.active():
        products = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        dtypes = tuple(map(stored, jax.tree.leaves(parameters)))
        key = dtype, products, dtypes, structure, shapes_of_inputs, tuple(like.fed), tuple(like.pulled)
        if key not in compiled:
            compiled[key] = beside(run.lower(cast(), *arguments(like)).compile)
    compiling = compiled[key]

    def differentiate(o: Objective) -> tuple[Any, dict[str, NDArray], NDArray]:
        with precision.active():
            by_parameter, by_site, by_float = jax.device_get(compiling.result()(cast(), *arguments(o)))
        return by_parameter, by_site, joined(by_float, [None] * (len(leaves) - len(by_float)))

    return differentiate
