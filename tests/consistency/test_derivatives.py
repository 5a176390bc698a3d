"""Are the derivatives right, in float64, for every group of parameters and for the pixels?

The tests compare reverse mode with differences of the loss, forward mode with reverse mode, and second derivatives with
their own symmetry.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from tests.helpers.precisions import precision_of
from vit_ref.model.skeleton import list_parameters
from vit_ref.verify.cases import CASES

pytestmark = pytest.mark.xdist_group("derivatives")

EPS = float(np.finfo(np.float64).eps)
# A layer's kernel and bias, or scale and bias, are one group, because they are used together.
LEAVES = (".kernel", ".bias", ".scale")


def _group(path: str) -> str:
    return path.rpartition(".")[0] if path.endswith(LEAVES) else path


GROUPS = sorted({_group(path) for path in list_parameters(CASES["rectangular"].config)} | {"pixels"})
Point = dict[str, Array]


class Functions(NamedTuple):
    """The model as functions of one point, which is its parameters by path and its "pixels". Compiled once.

    Attributes:
      point: the point at which to differentiate.
      loss: point -> scalar.
      gradient: point -> gradient of the loss.
      pair: (point, tangent, cotangent of the logits) -> Jacobian times tangent, cotangent times Jacobian.
      curvature: (point, direction) -> Hessian of the loss times the direction.
    """

    point: Point
    loss: Callable[[Point], Array]
    gradient: Callable[[Point], Point]
    pair: Callable[[Point, Point, Array], tuple[Array, Point]]
    curvature: Callable[[Point, Point], Point]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with precision_of(np.float64).active():
        yield


@pytest.fixture(scope="module")
def functions(example, cross_entropy) -> Functions:
    with precision_of(np.float64).active():
        model, pixels, labels, key = example(jnp.float64)
        graph, state = nnx.split(model)
    variables = nnx.to_flat_state(state)

    def at(point: Point) -> tuple[Array, Array]:
        filled = [(path, variable.replace(point[".".join(map(str, path))])) for path, variable in variables]
        return cross_entropy(nnx.merge(graph, nnx.from_flat_state(filled)), point["pixels"], labels, key)

    def loss(point: Point) -> Array:
        return at(point)[0]

    def pair(point: Point, tangent: Point, cotangent: Array) -> tuple[Array, Point]:
        _, pushed = jax.jvp(lambda point: at(point)[1], (point,), (tangent,))
        _, pull = jax.vjp(lambda point: at(point)[1], point)
        return pushed, pull(cotangent)[0]

    def curvature(point: Point, direction: Point) -> Point:
        return jax.jvp(jax.grad(loss), (point,), (direction,))[1]

    point = {".".join(map(str, path)): variable[...] for path, variable in variables} | {"pixels": pixels}
    return Functions(point, jax.jit(loss), jax.jit(jax.grad(loss)), jax.jit(pair), jax.jit(curvature))


def _direction(point: Point, group: str | None, draw: int = 0) -> Point:
    """Returns a random change of one group, or of all, as large as the values, so that a step is relative to them."""
    rng = np.random.default_rng([zlib.crc32((group or "all").encode()), draw])

    def change(path: str, value: Array) -> Array:
        scale = math.sqrt(np.mean(np.square(value))) if group in (None, _group(path)) else 0.0
        return jnp.asarray(rng.standard_normal(value.shape) * scale)

    return {path: change(path, value) for path, value in point.items()}


def _dot(a: Point, b: Point) -> float:
    return math.fsum(float(np.vdot(a[path], b[path])) for path in a)


def _norm(a: Point) -> float:
    return math.sqrt(_dot(a, a))


# Central differences have an error of truncation, h^2 |f'''| / 6, and one of rounding, eps |f| / h for each unit of
# rounding in f. The sum is least at h = (3 eps |f| / |f'''|)^(1/3), about 3e-6 here.
STEP = 2.0**-18
# Units of rounding in the loss, which is a mean of differences of a logit and a logarithm.
ROUNDINGS = 4
# f''' comes from third differences, so the bound does not depend on the derivatives under test. At this step their
# error
# is 3 eps |f| / H^3 = 6e-9 from rounding, and H^2 f''''' / 4, some percent where f bends most.
THIRD_STEP = 2.0**-7


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradient_is_what_central_differences_say(group: str, functions: Functions) -> None:
    gradient = functions.gradient(functions.point)
    signal = noise = 0.0
    for draw in range(3):
        direction = _direction(functions.point, group, draw)

        def along(step: float, direction: Point = direction) -> float:
            moved = {path: value + step * direction[path] for path, value in functions.point.items()}
            return float(functions.loss(moved))

        difference = (along(STEP) - along(-STEP)) / (2 * STEP)
        h = THIRD_STEP
        third = (along(2 * h) - 2 * along(h) + 2 * along(-h) - along(-2 * h)) / (2 * h**3)
        # Half as much again allows for the error of the third difference.
        bound = 1.5 * STEP**2 * abs(third) / 6 + ROUNDINGS * EPS * abs(along(0.0)) / STEP
        analytic = _dot(gradient, direction)
        assert abs(analytic - difference) <= bound
        signal, noise = max(signal, abs(analytic)), max(noise, bound)
    # Otherwise an error in the seventh digit of a gradient would pass.
    assert signal > 1e7 * noise


@pytest.mark.parametrize("group", GROUPS)
def test_forward_mode_is_the_transpose_of_reverse_mode(group: str, functions: Functions) -> None:
    tangent = _direction(functions.point, group)
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((3, 23)))
    pushed, pulled = functions.pair(functions.point, tangent, cotangent)
    forward, reverse = float(np.vdot(cotangent, pushed)), _dot(pulled, tangent)
    # Each side is a sum of terms with this total size.
    bound = 8 * EPS * float(jnp.linalg.norm(cotangent) * jnp.linalg.norm(pushed))
    assert abs(forward - reverse) <= bound
    assert abs(forward) > 1e10 * bound


@pytest.mark.parametrize("group", GROUPS)
def test_second_derivatives_are_symmetric(group: str, functions: Functions) -> None:
    one, other = _direction(functions.point, group), _direction(functions.point, None)
    curved_one, curved_other = (functions.curvature(functions.point, direction) for direction in (one, other))
    # Rounding is at worst one unit of the products' sizes.
    bound = EPS * (_norm(other) * _norm(curved_one) + _norm(one) * _norm(curved_other))
    assert abs(_dot(other, curved_one) - _dot(one, curved_other)) <= bound
    assert abs(_dot(other, curved_one)) > 1e10 * bound
