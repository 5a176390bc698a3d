"""The recipe of a fine-tuning run: every choice that changes the result, in one object that the run saves."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from vit_ref.errors import InputError

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["linear", "cosine", "constant"]
Precision = Literal["float32", "mixed"]
HeadName = Literal["fresh", "keep"]
AttentionName = Literal["xla", "cudnn"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run learns, besides the checkpoint and the images.

    The defaults are those of Flax's ViT tutorial: SGD with Nesterov momentum and a linear schedule to zero.

    Attributes:
      epochs: passes over the training images.
      batch_size: images in a step, over all devices and processes.
      optimizer: "sgd", with Nesterov momentum, or "adamw".
      learning_rate: the highest learning rate.
      schedule: the fall of the rate after the warm-up: "linear", "cosine", or "constant" for no fall. The rate reaches
        zero after the last update.
      warmup_ratio: part of all updates in which the rate rises, 0 to 1. In r such updates, each adds 1 / (r + 1) of the
        highest rate, and so does the first.
      momentum: momentum of SGD.
      weight_decay: AdamW decays kernels, decoupled from the gradient. SGD adds the decay to the gradient of kernels.
      layer_decay: learning rate of a block, divided by that of the block above it; 1 for the same rate everywhere. Norm
        and head are above the highest block, the embeddings below the lowest (BEiT, Bao et al. 2021,
        https://arxiv.org/abs/2106.08254, appendix).
      freeze_blocks: number of blocks to freeze, from the lowest and with the embeddings. -1 freezes all but the head.
      grad_accum_steps: number of steps whose mean gradient makes one update. Left-over steps at the end of the run
        change nothing.
      grad_clip: largest global norm of the gradient; None for no limit.
      label_smoothing: part of a label's weight that all classes share.
      dropout: dropout rate of the hidden values and the attention probabilities; None for the rate of the checkpoint.
      precision: "float32", or "mixed": blocks compute in bfloat16; parameters, optimizer, token stream, norms, softmax
        and loss are float32.
      attention: "xla", or "cudnn" for `vit_ref.model.attention.cudnn`. The latter needs mixed precision, an NVIDIA GPU
        and a model without dropout of attention probabilities.
      image_size: side of the images in pixels. The position embeddings are resized to it. None for the size of the
        checkpoint.
      head: "fresh" starts a new head of zeros for the classes of the data. "keep" takes the head of the checkpoint,
        which has to have the same classes.
      augment: whether to crop, flip and jitter training images.
      seed: seed of the head, the order of images, their augmentation and dropout.

    Raises:
      InputError: a value is out of range.
    """

    epochs: int = 3
    batch_size: int = 32
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 1e-3
    schedule: ScheduleName = "linear"
    warmup_ratio: float = 0.0
    momentum: float = 0.8
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    freeze_blocks: int = 0
    grad_accum_steps: int = 1
    grad_clip: float | None = None
    label_smoothing: float = 0.0
    dropout: float | None = None
    precision: Precision = "float32"
    attention: AttentionName = "xla"
    image_size: int | None = None
    head: HeadName = "fresh"
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}: give an integer of at least {least}")
            if value >= 2**31:  # jax, numpy and grain count in 32 bits
                raise InputError(f"{name} is {value!r}: give an integer below {2**31}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value!r}: give a number from {low:g} to {high:g}")
        for name, known in _CHOICES:
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(get_args(known))}")
        if self.attention == "cudnn" and self.precision != "mixed":
            raise InputError(
                f"attention is 'cudnn' and precision is {self.precision!r}: give precision 'mixed' with it"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, as `Recipe(**fields)` takes them back."""
        return dataclasses.asdict(self)


_CHOICES = (
    ("optimizer", OptimizerName),
    ("schedule", ScheduleName),
    ("precision", Precision),
    ("attention", AttentionName),
    ("head", HeadName),
)
_INTEGERS = (("epochs", 1), ("batch_size", 1), ("grad_accum_steps", 1), ("freeze_blocks", -1), ("seed", 0))
# NaN is in no range. A rate of zero learns nothing, and a rate of 1000 is a typing error.
_RANGES = (
    ("learning_rate", 1e-12, 100.0),
    ("warmup_ratio", 0.0, 1.0),
    ("momentum", 0.0, 0.9999),
    ("weight_decay", 0.0, 10.0),
    ("layer_decay", 1e-3, 1.0),
    ("grad_clip", 1e-6, 1e6),
    ("label_smoothing", 0.0, 0.9),
    ("dropout", 0.0, 0.9),
    ("image_size", 1, 8192),
)
