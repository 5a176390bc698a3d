"""What known bugs at sites that a candidate does not show make of the first value that it shows after them.

The bug's own site is hidden, so the oracle carries each guess on from there to the site that is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator

from numpy.typing import NDArray

from vit_ref.config import ViTConfig
from vit_ref.porting import Tensors
from vit_ref.verify.guesses import Guess
from vit_ref.verify.hypotheses import NAMED, Upstream
from vit_ref.verify.oracle import NumpyOracle
from vit_ref.verify.trace import Trace

# What ports write into their LayerNorms whatever the checkpoint says: the defaults of flax and big_vision, of PyTorch,
# and of Hugging Face's ViT.
_EPSILONS = (1e-6, 1e-5, 1e-12)


def hidden_before(site: str, names: list[str], shown: Container[str]) -> tuple[str, ...]:
    """The sites right before `site` that a candidate does not show, in order."""
    gap: list[str] = []
    for name in reversed(names[: names.index(site)]):
        if name in shown:
            break
        gap.insert(0, name)
    return tuple(gap)


def across(
    config: ViTConfig,
    tensors: Tensors,
    pixels: NDArray,
    truth: Trace,
    names: list[str],
    site: str,
    gap: tuple[str, ...],
) -> Iterator[Guess]:
    """Guesses at `site` that follow from a bug inside the gap before it, the cheap and likely ones first.

    Args:
      config: the model's configuration.
      tensors: the checkpoint's, under Hugging Face's names.
      pixels: the images.
      truth: the reference's trace in float64.
      names: all sites in order.
      site: the first site that diverges.
      gap: the sites right before it that are not shown.

    Yields:
      Every guess at every hidden site, where the gap lies in one block; then whole models of another activation or
      epsilon, which have the same bug in every block of the gap.
    """
    if len({".".join(name.split(".")[:2]) for name in gap}) == 1:
        oracle = NumpyOracle(config, tensors)
        for hidden in gap:
            before = {name: truth[name] for name in names[: names.index(hidden)]}
            for label, guess, *_ in Upstream(config, tensors, pixels, truth, hidden).guesses():
                if guess.shape == truth[hidden].shape:
                    yield f"{label}, at {hidden}", oracle.value(site, pixels, {**before, hidden: guess})
    known = {name: truth[name] for name in names[: names.index(gap[0])]}
    activations = dict.fromkeys([config.hidden_act, *NAMED])
    epsilons = dict.fromkeys([config.layer_norm_eps, *_EPSILONS])
    for epsilon, activation in itertools.product(epsilons, activations):
        other = dataclasses.replace(config, hidden_act=activation, layer_norm_eps=epsilon)
        if other == config:
            continue
        said = [NAMED.get(activation, activation)] if activation != config.hidden_act else []
        said += [f"LayerNorm epsilon {epsilon:g}"] if epsilon != config.layer_norm_eps else []
        yield f"{' and '.join(said)} throughout", NumpyOracle(other, tensors).value(site, pixels, known)
