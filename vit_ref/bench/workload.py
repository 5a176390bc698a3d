"""A workload to time: one size, batch, precision and pass, and its number of operations."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.verify import precision as precisions

Pass = Literal["forward", "train"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# The precisions in which parameters and the state of the optimizer stay float32.
PRECISIONS = {name: precision for name, precision in precisions.PRECISIONS.items() if precision.stored is None}
CLASSES = 1000


class Workload(NamedTuple):
    """One thing to time.

    Attributes:
      size: a variant of `ViTConfig.variant`, such as "B/16". Images have 224 pixels a side, and there are 1000 classes.
      batch: number of images.
      precision: a key of `PRECISIONS`, such as "float32", or "mixed" for bfloat16 with parameters in float32.
      what: "forward", the forward pass, or "train", which is loss, backward pass and AdamW.
    """

    size: str
    batch: int
    precision: str
    what: Pass

    def __str__(self) -> str:
        return f"{self.what}, {self.size}, batch {self.batch}, {self.precision}"

    @property
    def config(self) -> ViTConfig:
        """The model's configuration."""
        return ViTConfig.variant(self.size, num_labels=CLASSES)

    @property
    def numerics(self) -> precisions.Precision:
        """The precision of storage and computation."""
        return PRECISIONS[self.precision]

    def flops(self) -> int:
        """Counts the floating point operations of all matrix products, two a multiplication, in closed form.

        The backward pass of a linear layer is two products as large as its own. That of the patches is one, because
        pixels get no gradient.
        """
        once = count_operations(self.config)
        if self.what == "forward":
            return self.batch * sum(once.values())
        return self.batch * (3 * sum(once.values()) - once["patches"])

    def inputs(self) -> tuple[NDArray, NDArray]:
        """Returns images (B, 224, 224, 3), float32, and labels (B,), int32."""
        rng = np.random.default_rng(0)
        pixels = rng.standard_normal((self.batch, *self.config.image_hw, 3), dtype=np.float32)
        return pixels, rng.integers(CLASSES, size=self.batch).astype(np.int32)


def count_operations(config: ViTConfig) -> dict[str, int]:
    """Counts the operations of one image's forward pass, by kind of layer, over all blocks."""
    rows, columns = config.grid()
    patches, tokens, width = rows * columns, rows * columns + 1, config.hidden_size
    depth, hidden = config.num_hidden_layers, config.intermediate_size
    return {
        "patches": 2 * patches * config.patch_hw[0] * config.patch_hw[1] * config.num_channels * width,
        "query, key, value": depth * 6 * tokens * width * width,
        "scores, context": depth * 4 * tokens * tokens * width,
        "attention's output": depth * 2 * tokens * width * width,
        "mlp": depth * 4 * tokens * width * hidden,
        "head": 2 * width * config.num_labels,
    }


def parse_workload(size: str, batch: int, precision: str, what: str) -> Workload:
    """Makes a workload from its parts as text and numbers.

    Args:
      size: size of the model, such as "B/16".
      batch: number of images.
      precision: key of `PRECISIONS`.
      what: "forward" or "train".

    Raises:
      InputError: a value is unknown or out of range.
    """
    ViTConfig.variant(size)
    if batch < 1:
        raise InputError(f"batch is {batch}: give a positive number of images")
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}")
    if what not in PASSES:
        raise InputError(f"pass is {what!r}: give one of {', '.join(PASSES)}")
    return Workload(size, batch, precision, what)
