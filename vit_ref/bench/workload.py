"""What is timed: one size, batch, precision and pass, and how many operations that is."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import InputError
from vit_ref.model.config import ViTConfig
from vit_ref.verify import precision as precisions

Pass = Literal["forward", "train"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# Those in which parameters, and what an optimizer keeps of them, stay float32.
PRECISIONS = {name: precision for name, precision in precisions.PRECISIONS.items() if precision.stored is None}
CLASSES = 1000


class Workload(NamedTuple):
    """One thing to time.

    Attributes:
      size: a variant of `ViTConfig.variant`, as in "B/16", on 224 pixels and 1000 classes.
      batch: images.
      precision: one of `PRECISIONS`, as in "float32", or "mixed": bfloat16 computed from parameters in float32.
      what: "forward", the forward pass, or "train": loss, backward pass and AdamW.
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
        """What is computed in what."""
        return PRECISIONS[self.precision]

    def flops(self) -> int:
        """Floating point operations of all matrix products, two a multiplication, in closed form.

        A linear layer's backward pass is two products as large as its own, the patches' one: pixels get no gradient.
        """
        once = count_operations(self.config)
        if self.what == "forward":
            return self.batch * sum(once.values())
        return self.batch * (3 * sum(once.values()) - once["patches"])

    def inputs(self) -> tuple[NDArray, NDArray]:
        """Images (B, 224, 224, 3), float32, and labels (B,), int32."""
        rng = np.random.default_rng(0)
        pixels = rng.standard_normal((self.batch, *self.config.image_hw, 3), dtype=np.float32)
        return pixels, rng.integers(CLASSES, size=self.batch).astype(np.int32)


def count_operations(config: ViTConfig) -> dict[str, int]:
    """Operations of one image's forward pass, by layer, over all blocks."""
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
    """A workload of what a person typed.

    Raises:
      InputError: one of them is not known.
    """
    ViTConfig.variant(size)
    if batch < 1:
        raise InputError(f"batch is {batch}: give a positive number of images")
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}")
    if what not in PASSES:
        raise InputError(f"pass is {what!r}: give one of {', '.join(PASSES)}")
    return Workload(size, batch, precision, what)
