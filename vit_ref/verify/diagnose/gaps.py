"""Tries bugs at hidden sites, which lie before a divergence and which the candidate does not show.

The oracle carries each bug on from its own site to the first site that is shown.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from numpy.typing import NDArray

from vit_ref.verify.diagnose.known_bugs import NAMED, list_bugs_at
from vit_ref.verify.diagnose.predictions import Prediction
from vit_ref.verify.references.numpy_oracle import NumpyOracle, split

# Candidates often write these into their LayerNorms, whatever the checkpoint says. They are the defaults of flax and
# big_vision, of PyTorch, and of Hugging Face's ViT.
_EPSILONS = (1e-6, 1e-5, 1e-12)


def explain_across(
    oracle: NumpyOracle, site: str, pixels: NDArray, known: Mapping[str, NDArray], gap: tuple[str, ...]
) -> Iterator[Prediction]:
    """Yields bugs inside a gap with the value that each gives at the site after it, the cheap and likely ones first.

    Args:
      oracle: the right oracle.
      site: the first site that diverges.
      pixels: float32 images (B, height, width, C).
      known: right values of the sites before `site`.
      gap: the hidden sites right before `site`.

    Yields:
      Every known bug of every hidden site, if the gap lies in one block. Then whole models with another activation or
      epsilon, which have the same bug in every block of the gap.
    """
    if len({split(name)[0] for name in gap}) == 1:
        for hidden in gap:
            for bug in list_bugs_at(oracle, hidden, known):
                wrong = bug.value(oracle, hidden, pixels, known)
                value = oracle.value(site, pixels, {**oracle.before(hidden, known), hidden: wrong})
                yield Prediction(f"{bug.label}, at {hidden}", value)
    config = oracle.config
    activations = dict.fromkeys([config.hidden_act, *NAMED])
    epsilons = dict.fromkeys([config.layer_norm_eps, *_EPSILONS])
    for epsilon, activation in itertools.product(epsilons, activations):
        changes = [NAMED.get(activation, activation)] if activation != config.hidden_act else []
        changes += [f"LayerNorm epsilon {epsilon:g}"] if epsilon != config.layer_norm_eps else []
        if changes:
            other = dataclasses.replace(config, hidden_act=activation, layer_norm_eps=epsilon)
            value = NumpyOracle(other, oracle.tensors).value(site, pixels, oracle.before(gap[0], known))
            yield Prediction(f"{' and '.join(changes)} throughout", value)
