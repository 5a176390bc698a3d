"""A wrong value at a site, and the explanations that fit it."""

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
    """A wrong value at a site.

    Attributes:
      site: its name.
      value: the candidate's value.
      truth: the right value.
      bound: the relative RMS error up to which a bug explains the value.
      made_in: see `Cause.made_in`.
    """

    site: str
    value: NDArray
    truth: NDArray
    bound: float = SEMANTIC_RMS
    made_in: str = "oracle"

    @property
    def comparable(self) -> bool:
        """Whether the value is finite and has the right shape, so that it can be explained."""
        return self.value.shape == self.truth.shape and bool(np.isfinite(self.value).all())

    @property
    def worst(self) -> slice:
        """The index of the image with the largest error."""
        image = int(np.abs(self.value - self.truth).reshape(len(self.value), -1).max(axis=1).argmax())
        return slice(image, image + 1)

    def by_value(self) -> Iterator[Prediction]:
        """Yields the explanations that follow from the value itself."""
        return explain_by_value(self.truth, self.value, np.ix_(*find_wrong(self.value, self.truth)))

    def causes(self, *explanations: Iterable[Prediction]) -> tuple[Cause, ...]:
        """Returns the explanations that fit, the best first.

        Args:
          *explanations: the explanations to try.
        """
        before = error(self.value, self.truth).rms
        wrong = np.ix_(*find_wrong(self.value, self.truth))
        everywhere: list[Cause] = []
        there_alone: list[Cause] = []
        # One at a time, because each value of a real model is megabytes.
        for label, value, rounded_to in chain(*explanations):
            # The bug may be in one head, image or token alone. Then it must explain that one and no more.
            mixed = self.truth.copy()
            mixed[wrong] = value[wrong]
            for fitting, tried in ((everywhere, value), (there_alone, mixed)):
                after = error(self.value, tried).rms
                if after <= self.bound and after < before / 4:
                    fitting.append(Cause(label, self.site, before, after, rounded_to, self.made_in))
                    break
        causes = sorted(everywhere or there_alone, key=lambda cause: cause.after)
        # An epsilon of 1e-13 fits a candidate that has 1e-12, though a thousand times less well.
        return tuple(cause for cause in causes if cause.after <= 100 * max(causes[0].after, _EPS))[:3]


def find_wrong(value: NDArray, truth: NDArray) -> list[NDArray]:
    """Returns the indices along each axis of elements that differ by more than the semantic gate allows.

    Args:
      value: the wrong value.
      truth: the right value.
    """
    wrong = wrong_elements(value, truth)
    return [
        np.flatnonzero(wrong.any(axis=tuple(k for k in range(value.ndim) if k != axis))) for axis in range(value.ndim)
    ]


def wrong_elements(value: NDArray, truth: NDArray) -> NDArray:
    """Returns a mask of the elements that differ by more than the semantic gate allows; all if none does.

    Args:
      value: the wrong value.
      truth: the right value.
    """
    limit = SEMANTIC_MAX * max(float(np.abs(truth).max()), np.finfo(np.float64).tiny)
    wrong = np.abs(value - truth) > limit
    return wrong if wrong.any() else np.ones_like(wrong)
