"""Sites before a divergence that a candidate does not show, and what bugs there make of the first that it shows.

The oracle carries each bug on from the site where it is to the site that is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from numpy.typing import NDArray

from vit_ref.verify.diagnose.known_bugs import NAMED, list_bugs_at
from vit_ref.verify.diagnose.predictions import Prediction
from vit_ref.verify.references.numpy_oracle import NumpyOracle, split

# What ports write into their LayerNorms whatever the checkpoint says: the defaults of flax and big_vision, of PyTorch,
# and of Hugging Face's ViT.
_EPSILONS = (1e-6, 1e-5, 1e-12)


def explain_across(
    oracle: NumpyOracle, site: str, pixels: NDArray, known: Mapping[str, NDArray], gap: tuple[str, ...]
) -> Iterator[Prediction]:
    """Bugs inside a gap, and what each makes of the site after it, the cheap and likely ones first.

    Args:
      oracle: the right one.
      site: the first site that diverges.
      pixels: the images.
      known: right values of the sites before it.
      gap: the sites right before it that are not shown.

    Yields:
      Every known bug of every hidden site, where the gap lies in one block; then whole models of another activation or
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
        said = [NAMED.get(activation, activation)] if activation != config.hidden_act else []
        said += [f"LayerNorm epsilon {epsilon:g}"] if epsilon != config.layer_norm_eps else []
        if said:
            other = dataclasses.replace(config, hidden_act=activation, layer_norm_eps=epsilon)
            value = NumpyOracle(other, oracle.tensors).value(site, pixels, oracle.before(gap[0], known))
            yield Prediction(f"{' and '.join(said)} throughout", value)
