"""A first look at a candidate, on the values that it shows while it is run for another purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vit_ref.verify.gates import CLEARLY_WRONG, SEMANTIC_RMS, Error, against, error, wrong_sites

# It gets one line about the first divergence, as soon as it is known.
OnDivergence = Callable[[str], None]


def ignore_divergence(line: str) -> None:
    """Does nothing with a line."""


class FirstLook:
    """Comparison of a candidate's values in float64 with the reference's.

    Args:
      truth: the reference's values in float64, by site, for the rows that the candidate is run on.
      names: the sites in order.
    """

    def __init__(self, truth: Mapping[str, NDArray], names: Sequence[str]):
        self._truth, self._names = truth, names
        self._errors: dict[str, Error] = {}
        self._exact = False

    def see(self, site: str, value: NDArray) -> None:
        """Compares one value. The last value of a site counts.

        Args:
          site: the site's name.
          value: the candidate's value.
        """
        self._exact |= value.dtype == np.float64
        if site in self._truth:
            self._errors[site] = error(value, self._truth[site])

    @property
    def divergence(self) -> tuple[str, Error] | None:
        """The first site in order whose value is wrong, with its error.

        It is None if no value is wrong, or if rounding may still explain the error. It is None too if no value is
        float64: such a candidate is refused.
        """
        site = next(iter(wrong_sites(self._errors, self._names)), None) if self._exact else None
        return None if site is None or self._errors[site].rms <= CLEARLY_WRONG else (site, self._errors[site])


def describe_divergence(candidate: str, site: str, error: Error, where: str = "") -> str:
    """Returns a line about the first divergence.

    Args:
      candidate: the candidate's name.
      site: the site of the divergence.
      error: its error.
      where: the part of the inputs that was looked at; "" for all.
    """
    how = error.reason or f"float64 relative RMS error {against(error.rms, SEMANTIC_RMS)}"
    return f"{candidate}: first divergence at {site}: {how}{where and f', {where}'}"
