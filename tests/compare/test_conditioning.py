"""Do values and gradients pass that are ill-conditioned in any dtype, and do wrong ones fail there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_ref
from vit_ref.verify.gates import CLEARLY_WRONG, SEMANTIC_RMS
from vit_ref.verify.results import CandidateReport

WEIGHTS = {
    name: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    for seed, (name, shape) in enumerate({"mix": (5, 2), "scale": (2,), "head": (2, 7)}.items())
}
INPUTS = {"x": np.random.default_rng(7).normal(size=(4, 5))}
# A norm over two channels gives 1 and -1, but for this. So its gradient is so much smaller than its terms.
EPSILON = 1e-10


def divided(x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)


def multiplied(x: Any) -> Any:
    """Is the same formula, which rounds elsewhere."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)


def detached(x: Any) -> Any:
    """Has no gradient through the deviation, so its terms do not cancel."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / jax.lax.stop_gradient(jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON))


def model(norm: Callable[[Any], Any], scaled: Callable[[Any], Any] = lambda w: w) -> vit_ref.Candidate:
    def forward(w: Mapping[str, Any], x: Any, tap: Any = lambda name, value: value) -> Any:
        mixed = tap("mixed", x @ w["mix"])
        return tap("norm", norm(mixed) * scaled(w["scale"])) @ w["head"]

    return vit_ref.Candidate(load=lambda checkpoint: (forward, WEIGHTS), name=norm.__name__)


@jax.custom_gradient
def enlarged(w: Any) -> Any:
    """Returns what it gets, and a gradient that is wrong in its ninth digit."""
    return w, lambda gradient: gradient * (1 + 1e-9)


def judged(candidate: vit_ref.Candidate) -> CandidateReport:
    return vit_ref.compare(model(divided), candidate, inputs=INPUTS)


def near(mixes: Callable[[Any, Any], Any], epsilon: float = EPSILON) -> vit_ref.Candidate:
    """Declares a norm over two channels that differ by 1e-5 of their size. What precedes it rounds, and it enlarges."""
    weights = {"mix": np.stack([WEIGHTS["mix"][:, 0], WEIGHTS["mix"][:, 0] + 1e-5 * WEIGHTS["mix"][:, 1]], -1)}

    def forward(w: Mapping[str, Any], x: Any, tap: Any = lambda name, value: value) -> Any:
        mixed = tap("mixed", mixes(x, w["mix"]))
        centred = mixed - mixed.mean(-1, keepdims=True)
        return tap("norm", centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon))

    return vit_ref.Candidate(load=lambda checkpoint: (forward, weights), name="near")


def at_once(x: Any, w: Any) -> Any:
    return x @ w


def backwards(x: Any, w: Any) -> Any:
    return sum(x[:, i : i + 1] * w[i] for i in reversed(range(5)))


def wrong(report: CandidateReport) -> set[str]:
    assert report.forward.passed and report.backward
    return {result.site for result in report.backward.semantic_failures}


def test_right_gradients_pass_whose_terms_cancel() -> None:
    report = judged(model(multiplied))
    assert wrong(report) == set()
    assert report.passed and report.backward
    found = {result.site: result.exact for result in report.backward.results}
    # Measured: 1.4e-8 to 2.7e-8, and gates of 2e-7 to 6e-7. The others are well-conditioned.
    for name in ("mix", "mixed", "input:x"):
        assert 1e3 * SEMANTIC_RMS < found[name].rms <= found[name].semantic_gate < 1e-3, name
    for name in ("head", "scale", "norm"):
        assert found[name].semantic_gate == SEMANTIC_RMS, name
    # A parameter of the model itself is no layer's, though its name is "scale". So its gate is its own.
    assert {result.site: result.gate for result in report.backward.results}["scale"] < 1e-5


@pytest.mark.parametrize("precision", ["tensorfloat32", "bfloat16", "float16"])
def test_float32_tells_what_float64_loses_in_every_precision(precision: str) -> None:
    """A norm stays float32 if products are coarser, so the unit of a precision would tell too little."""
    assert vit_ref.compare(model(divided), model(multiplied), inputs=INPUTS, precision=precision).passed
    report = vit_ref.compare(model(divided), model(detached), inputs=INPUTS, precision=precision)
    assert {"mix", "mixed", "input:x"} <= wrong(report)


def test_wrong_gradients_fail_there_and_beside_them() -> None:
    assert {"mix", "mixed", "input:x"} <= wrong(judged(model(detached)))
    assert wrong(judged(model(divided, enlarged))) == {"scale"}


def test_right_values_pass_that_few_digits_decide() -> None:
    report = vit_ref.compare(near(at_once), near(backwards), inputs=INPUTS)
    assert report.passed
    found = {result.site: result.exact for result in report.forward.results}
    # Measured: 1.2e-11, gate 1.3e-9.
    assert 3 * SEMANTIC_RMS < found["norm"].rms <= found["norm"].semantic_gate < 1e-8
    assert found["mixed"].semantic_gate == SEMANTIC_RMS


def test_wrong_values_fail_there() -> None:
    report = vit_ref.compare(near(at_once), near(backwards, EPSILON * (1 + 1e-7)), inputs=INPUTS)
    assert [result.site for result in report.forward.semantic_failures] == ["norm", "output"]
    # So small that rounding could have been the reason, had the reference rounded more.
    assert report.forward.semantic_failures[0].exact.rms < CLEARLY_WRONG
