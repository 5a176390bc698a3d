"""The meaning of a head's logits: exclusive classes, independent labels, or plain values.

`problem_type` in config.json and the number of labels decide it, as in the image-classification pipeline of
transformers. The two differ in one case: for a regression the pipeline prints a sigmoid or a softmax, and this package
prints the values.
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
    """Returns what the logits of this model mean.

    Returns:
      - "exclusive": one class is right, and a softmax gives the probabilities.
      - "independent": each label is right or wrong by itself, and a sigmoid gives its probability. A single label is
        such a label.
      - "values": the logits are the values of a regression, and no probabilities.

    Raises:
      ConfigError: `problem_type` is unknown.
    """
    problem = config.extra.get("problem_type")
    meaning = _MEANINGS.get(problem) if isinstance(problem, str) else None
    if problem is not None and meaning is None:
        raise ConfigError(
            f"config.json: problem_type is {problem!r}, which is unknown: give one of {', '.join(_MEANINGS)}, or leave"
            " it out"
        )
    if meaning is None or meaning == "exclusive":
        # A softmax of one logit is 1 for every image.
        return "independent" if config.num_labels == 1 else "exclusive"
    return meaning


def name_unit(config: ViTConfig) -> Literal["probability", "value"]:
    """Names what `compute_scores` returns for this model.

    Raises:
      ConfigError: `problem_type` is unknown.
    """
    return "value" if read_meaning(config) == "values" else "probability"


def compute_scores(logits: ArrayLike, config: ViTConfig) -> NDArray[np.float64]:
    """Returns the probabilities of the classes, or the values of a regression.

    Args:
      logits: (..., classes), of any floating dtype.
      config: the model's configuration.

    Returns:
      The scores (..., classes), float64.

    Raises:
      ConfigError: `problem_type` is unknown.
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
      InputError: the classes of the head do not exclude each other.
      ConfigError: `problem_type` is unknown.
    """
    if read_meaning(config) != "exclusive":
        described = "it has one label" if config.num_labels == 1 else f"problem_type is {config.extra['problem_type']}"
        raise InputError(
            f"{where}: its head does not choose one of several classes ({described}), and cross-entropy needs that:"
            " take a fresh head (--head fresh)"
        )
