"""The meaning of a head's logits: exclusive classes, independent labels, or plain values.

`problem_type` in config.json and the number of labels decide it, as in the image-classification pipeline of
transformers. One case differs: the pipeline prints a sigmoid or a softmax of a regression, and this package prints its
values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax

from vit_ref.errors import ConfigError, InputError
from vit_ref.model.config import ViTConfig

Meaning = Literal["exclusive", "independent", "values"]

_MEANINGS: dict[str, Meaning] = {
    "single_label_classification": "exclusive",
    "multi_label_classification": "independent",
    "regression": "values",
}


def read_meaning(config: ViTConfig) -> Meaning:
    """What the logits of this model mean.

    Returns:
      "exclusive": one class is right, and a softmax gives the probabilities. "independent": each label is right or
      wrong by itself, and a sigmoid of its logit gives its probability; so is a single label. "values": the logits of
      a regression, which are no probabilities.

    Raises:
      ConfigError: `problem_type` is unknown.
    """
    problem = config.extra.get("problem_type")
    found = _MEANINGS.get(problem) if isinstance(problem, str) else None
    if problem is not None and found is None:
        raise ConfigError(
            f"config.json: problem_type is {problem!r}, so the logits mean nothing known: give one of"
            f" {', '.join(_MEANINGS)}, or leave it out"
        )
    if found is None or found == "exclusive":
        # A softmax of one logit is 1, whatever the image.
        return "independent" if config.num_labels == 1 else "exclusive"
    return found


def name_unit(config: ViTConfig) -> Literal["probability", "value"]:
    """What `compute_scores` returns for this model.

    Raises:
      ConfigError: see `read_meaning`.
    """
    return "value" if read_meaning(config) == "values" else "probability"


def compute_scores(logits: ArrayLike, config: ViTConfig) -> NDArray[np.float64]:
    """The probabilities of the classes, or the values of a regression.

    Args:
      logits: (..., classes), of any floating dtype.
      config: the model's configuration.

    Returns:
      The same shape, float64.

    Raises:
      ConfigError: see `read_meaning`.
    """
    values = np.asarray(logits).astype(np.float64)
    match read_meaning(config):
        case "exclusive":
            return softmax(values, axis=-1)
        case "independent":
            return expit(values)
    return values


def require_exclusive(config: ViTConfig, where: str) -> None:
    """Refuses a head that cross-entropy cannot train.

    Args:
      config: the model's configuration.
      where: the checkpoint, for the message.

    Raises:
      InputError: its classes do not exclude each other.
      ConfigError: see `read_meaning`.
    """
    if read_meaning(config) != "exclusive":
        described = "it has one label" if config.num_labels == 1 else f"problem_type is {config.extra['problem_type']}"
        raise InputError(
            f"{where}: cross-entropy trains a head with one right class of several, and the head that is kept is none"
            f" ({described}): take a fresh head (--head fresh)"
        )
