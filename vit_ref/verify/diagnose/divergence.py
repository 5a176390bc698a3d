"""A wrong value at a site, and which of many explanations meet it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.diagnose.predictions import Prediction, explain_by_value
from vit_ref.verify.gates import SEMANTIC_MAX, SEMANTIC_RMS, error
from vit_ref.verify.results import Cause

_EPS = float(np.finfo(np.float64).eps)


class Divergence(NamedTuple):
    """A wrong value at a site, the right one, and the relative RMS error up to which a bug explains it."""

    site: str
    value: NDArray
    truth: NDArray
    bound: float = SEMANTIC_RMS

    @property
    def comparable(self) -> bool:
        """Whether there is anything to explain: a finite value of the right shape."""
        return self.value.shape == self.truth.shape and bool(np.isfinite(self.value).all())

    @property
    def worst(self) -> slice:
        """The image that is most wrong."""
        image = int(np.abs(self.value - self.truth).reshape(len(self.value), -1).max(axis=1).argmax())
        return slice(image, image + 1)

    def by_value(self) -> Iterator[Prediction]:
        """Explanations that are read off the value itself."""
        return explain_by_value(self.truth, self.value, np.ix_(*find_wrong(self.value, self.truth)))

    def causes(self, *explanations: Iterable[Prediction]) -> tuple[Cause, ...]:
        """The explanations that fit, the best first."""
        before = error(self.value, self.truth).rms
        wrong = np.ix_(*find_wrong(self.value, self.truth))
        everywhere: list[Cause] = []
        there_alone: list[Cause] = []
        # One at a time: of a real model each value is megabytes.
        for label, value, rounded_to in chain(*explanations):
            # One head, image or token alone may have the bug, which has to explain that one and no more.
            mixed = self.truth.copy()
            mixed[wrong] = value[wrong]
            for fitting, tried in ((everywhere, value), (there_alone, mixed)):
                after = error(self.value, tried).rms
                if after <= self.bound and after < before / 4:
                    fitting.append(Cause(label, self.site, before, after, rounded_to))
                    break
        causes = sorted(everywhere or there_alone, key=lambda cause: cause.after)
        # An epsilon of 1e-13 fits a port that has 1e-12, though a thousand times less well.
        return tuple(cause for cause in causes if cause.after <= 100 * max(causes[0].after, _EPS))[:3]


def find_wrong(value: NDArray, truth: NDArray) -> list[NDArray]:
    """Along each axis, where an element is further out than the largest one may be."""
    limit = SEMANTIC_MAX * max(float(np.abs(truth).max()), np.finfo(np.float64).tiny)
    wrong = np.abs(value - truth) > limit
    if not wrong.any():
        wrong[...] = True
    return [
        np.flatnonzero(wrong.any(axis=tuple(k for k in range(value.ndim) if k != axis))) for axis in range(value.ndim)
    ]
