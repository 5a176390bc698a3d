"""Keeps the references' values between checks, because no candidate and no mutant may reach a reference."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from vit_ref.verify.compare.objectives import Gradients, Objective
from vit_ref.verify.compare.trace import Trace
from vit_ref.verify.precision import FLOAT64, Precision
from vit_ref.verify.references.choice import NumpyReference
from vit_ref.verify.references.flax_vit import FlaxViTReference

Differentiate = Callable[[Objective], Gradients]


@contextlib.contextmanager
def remembered_references() -> Iterator[None]:
    """Keeps the references' values from run to run, because compiling them takes nearly half the time.

    Other weights, images or objectives have their own entries.
    """
    with contextlib.ExitStack() as stack:
        for owner in (FlaxViTReference, NumpyReference):
            stack.enter_context(mock.patch.object(owner, "trace", _remembering(owner.trace)))
        gradients = _remembering_each(FlaxViTReference.gradients)
        stack.enter_context(mock.patch.object(FlaxViTReference, "gradients", gradients))
        stack.enter_context(mock.patch.object(FlaxViTReference, "__init__", _built_once(FlaxViTReference.__init__)))
        yield


_ANSWERS: dict[str, Any] = {}


def _remembering(trace: Callable[..., Trace]) -> Callable[..., Trace]:
    @functools.wraps(trace)
    def answer(self: Any, pixels: Any, precision: Precision = FLOAT64) -> Trace:
        weights = self.params if isinstance(self, FlaxViTReference) else self.tensors
        key = digest(trace.__qualname__, repr(self.config), repr(precision), weights, pixels)
        if key not in _ANSWERS:
            _ANSWERS[key] = trace(self, pixels, precision)
        return dict(_ANSWERS[key])

    return answer


def _remembering_each(gradients: Callable[..., Differentiate]) -> Callable[..., Differentiate]:
    @functools.wraps(gradients)
    def answer(self: FlaxViTReference, pixels: Any, precision: Precision) -> Differentiate:
        key = digest("gradients", str(self.fused), repr(self.config), repr(precision), self.params, pixels)
        differentiate = functools.cache(lambda: gradients(self, pixels, precision))

        def one(objective: Objective) -> Gradients:
            mine = key + digest(objective._asdict())
            if mine not in _ANSWERS:
                _ANSWERS[mine] = differentiate()(objective)
            return _ANSWERS[mine]

        return one

    return answer


def _built_once(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def build(self: FlaxViTReference, config: Any, tensors: Any) -> None:
        key = digest("built", repr(config), tensors)
        if key not in _ANSWERS:
            init(self, config, tensors)
            _ANSWERS[key] = dict(vars(self))
        vars(self).update(_ANSWERS[key])

    return build


def digest(*question: Any) -> str:
    """Returns a digest of strings, arrays and trees of them, and of the way in which jax compiles."""
    # The compiler decides how a reference rounds.
    digest = hashlib.sha256(str(jax.config.values["jax_disable_most_optimizations"]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(question):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(leaf.encode() if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
