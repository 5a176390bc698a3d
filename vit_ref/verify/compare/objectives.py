"""Backward passes, for whoever is differentiated: objectives, and gradients by perturbing every site.

Gradients are pulled back from the classification loss and from random cotangents at the output: the loss alone leaves
directions out (its cotangents sum to zero over the classes, and vanish where the model is sure).
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

# By how many 32nds each objective's inputs are smaller, so that every look has seen large ones and small ones.
#
# They make twelve realisations of the rounding error, whose tail is heavy: on a trained ViT-S/14 one pull-back errs
# up to five times as much as the next. Of 361 gradients there, the one whose pooled error exceeds the reference's most
# does so by 1.8 at worst (bootstrap over sixteen objectives); pooled over six, by 2.4.
DARKER = (0, 11, 5, 8, 2, 10, 4, 7, 1, 9, 3, 6)
# Of all objectives, so many judge the formula, in float64: the loss and two random cotangents. A formula that is wrong
# is wrong for any that nobody chose; only rounding has luck.
SEMANTIC_OBJECTIVES = 3
# After how many objectives to ask whether the rest is likely to change the verdict, see `pooling.Pooled.settled`.
LOOKS = (SEMANTIC_OBJECTIVES, 6, len(DARKER))


class Objective(NamedTuple):
    """A scalar of the output: `loss_weight` times the mean cross-entropy, plus the inner product with `cotangent`.

    The cross-entropy is taken over the output's last axis. Inputs that are floats are multiplied by `brightness` first,
    so that no two objectives share their forward pass's rounding.
    For a part of a model: values in `fed` take the place of its own at those sites; and where there are any in
    `pulled`, the scalar is their inner product with the values at those sites, and the output has no part in it.
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
      sites: by site, shaped as the site.
      parameters: by the candidate's paths, through the weight map.
      inputs: by name, those that are floats.
    """

    sites: dict[str, NDArray]
    parameters: dict[str, NDArray]
    inputs: dict[str, NDArray]

    def named(self) -> dict[str, NDArray]:
        """All of them by name, in the order in which backpropagation meets them, parameters after the sites."""
        return {**self.sites, **self.parameters, **self.inputs}


def objectives_for(output: tuple[int, ...], seed: int = 0) -> tuple[Objective, ...]:
    """The classification loss on random labels, then random cotangents, of an output of the shape (B, ..., width)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, output[-1], output[:-1])
    first, *others = (1 - darker / 32 for darker in DARKER)
    return Objective(first, 1.0, labels, np.zeros(output)), *(
        Objective(brightness, 0.0, labels, rng.normal(size=output)) for brightness in others
    )


def require_shape(output: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises `UndifferentiableError` where an output is not shaped as an objective has it."""
    if tuple(output) != tuple(expected):
        raise UndifferentiableError(
            f"its output has shape {tuple(output)} and not {tuple(expected)}, so its gradients mean something else"
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
    """A forward pass that adds a perturbation to the value at every site, made ready to be differentiated.

    It is traced here and compiled in a thread of its own, beside whatever is traced next: XLA takes seconds for a real
    model, on one core.

    Args:
      forward: the forward pass. A perturbation of zero is added at every site whose value has the shape in
        `shapes`, and the gradient with respect to it is the site's.
      parameters: any tree. What is not stored in the precision under test is widened to at least float32.
      shapes: every site with the shape of its value; the last one is the output.
      inputs: any tree of arrays.
      precision: float64, or the one under test.
      like: an objective that is fed and pulled at the sites of those to come; by default at none.
      compiled: what earlier calls compiled for the same `forward`, which other parameters then share.

    Returns:
      A function that gives the gradients of one objective with respect to parameters, sites and inputs; all objectives
      share what is compiled. In place of an input that is no float there is None.
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

    # The parameters are a copy for each objective, whose memory their gradients take: reference and candidate in two
    # dtypes would else hold four for as long as there are objectives, of a real model gigabytes.
    @partial(jax.jit, donate_argnums=0)
    def run(parameters: Any, floats: list[jax.Array], *rest: Any) -> Any:
        # Made here and not given: as arguments they would take as much memory as all activations.
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
