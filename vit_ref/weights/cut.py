"""Cuts a checkpoint to its first and last block and a small grid of positions, so that a check of it takes seconds.

The cut is a checkpoint of the same layout, with files of the same names. No weight changes, so a loader that follows
the configuration is right or wrong on the cut as on the whole. The cut has other numbers of blocks and positions, so
it does not show what depends on these: blocks in the middle, the order of many blocks, the other positions, and sums
over many tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_ref.errors import CheckpointError
from vit_ref.model.config import ViTConfig
from vit_ref.weights import mapping, writing
from vit_ref.weights.checkpoint import CONFIG, FLAX_WEIGHTS, INDEX, PREPROCESSOR, WEIGHTS, Checkpoint
from vit_ref.weights.layouts import Layout, Rule
from vit_ref.weights.origin import Extent
from vit_ref.weights.tensor_files import LazyTensors
from vit_ref.weights.timm import is_timm

# Sides of the grid of a cut. Seventeen tokens are a prime number. A rectangle stays one, and its number of patches is a
# square, which FlaxViT needs.
_SQUARE, _RECTANGLE = (4, 4), (2, 8)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A checkpoint that was cut, in a temporary directory.

    Attributes:
      source: the cut.
      config: its configuration.
      whole: the configuration of the checkpoint that was cut.
      blocks: the numbers that the cut's blocks have in the checkpoint, in order.
      tensors: how many tensors of the model the cut has.
      of: how many the checkpoint has.
    """

    source: Checkpoint
    config: ViTConfig
    whole: ViTConfig
    blocks: tuple[int, ...]
    tensors: int
    of: int

    @property
    def extent(self) -> Extent:
        """What the cut keeps, for the report."""
        return Extent(self.blocks, self.config.grid(), self.config.image_hw, self.tensors)

    @property
    def note(self) -> str:
        """What was cut, and what a check of the cut does not verify."""
        numbers, new = (" and ".join(map(str, found)) for found in (self.blocks, range(len(self.blocks))))
        several = len(self.blocks) > 1
        blocks = f"{'blocks' if several else 'block'} {numbers} of {self.whole.num_hidden_layers}"
        if tuple(range(len(self.blocks))) != self.blocks:
            blocks += f", here blocks {new}"
        return (
            f"quick: this is a verdict on a cut of the checkpoint, and none on the whole: {blocks};"
            f" a grid of {_times(self.config.grid())} of {_times(self.whole.grid())} patches; images of"
            f" {_times(self.config.image_hw)} of {_times(self.whole.image_hw)} pixels; {self.tensors} of {self.of}"
            " tensors. Nothing else was verified: run it without quick for the full verdict"
        )

    @property
    def changes(self) -> str:
        """What the cut changes in the configuration, and what to do if a loader cannot follow."""
        return (
            f"quick changes num_hidden_layers from {self.whole.num_hidden_layers} to {self.config.num_hidden_layers}"
            f" and the image size from {_times(self.whole.image_hw)} to {_times(self.config.image_hw)}: make load()"
            " read both from the checkpoint, or leave out quick"
        )

    def crop(self, pixels: NDArray) -> NDArray:
        """Returns the middle of images of the whole checkpoint's size, as large as the cut's images.

        Args:
          pixels: images (B, height, width, C).
        """
        top, left = ((size - small) // 2 for size, small in zip(pixels.shape[1:3], self.config.image_hw, strict=True))
        height, width = self.config.image_hw
        return np.ascontiguousarray(pixels[:, top : top + height, left : left + width])


@contextlib.contextmanager
def open_cut(source: Checkpoint, config: ViTConfig) -> Iterator[Cut]:
    """Writes a cut of a checkpoint to a temporary directory, which is removed at the end.

    It reads the values of the kept tensors only, if the checkpoint was opened lazily.

    Args:
      source: the checkpoint.
      config: its configuration.

    Yields:
      The cut. Its path is a directory or a file, as the checkpoint's is, of the same name.

    Raises:
      CheckpointError: there is nothing to cut, or the cut cannot be written.
      MappingError: a tensor is missing or has a wrong shape.
    """
    layout = mapping.detect(source.tensors)
    mapping.require_shapes(source.tensors, config, layout)
    blocks, grid = _kept_blocks(config), _small_grid(config)
    if len(blocks) == config.num_hidden_layers and grid == config.grid():
        raise CheckpointError(
            f"{source.path}: num_hidden_layers is {config.num_hidden_layers} and the grid is {_times(grid)} patches, so"
            " there is nothing to cut: leave out quick"
        )
    height, width = (rows * side for rows, side in zip(grid, config.patch_hw, strict=True))
    content = source.config and _cut_config(source.config, len(blocks), (height, width))
    small = dataclasses.replace(
        config,
        num_hidden_layers=len(blocks),
        image_size=(height, width),
        extra=content if content and config.extra else config.extra,
    )
    rules = layout.bind(config, prefixed=mapping.is_prefixed(source.tensors, layout))
    names = _kept_names(source.tensors, layout, blocks)
    tensors = {new: np.asarray(source.tensors[name]) for new, name in names.items()}
    (positions,) = (rule for rule in rules if rule.destination == "position_embeddings")
    tensors[positions.source] = _corner(tensors[positions.source], positions, config, small)
    with tempfile.TemporaryDirectory(prefix="vit-ref-") as scratch:
        try:
            path, files = _write(Path(scratch), source, names, tensors, content)
        except OSError as error:
            raise CheckpointError(f"{scratch}: the cut cannot be written ({error}): free room there") from None
        cut = dataclasses.replace(source, path=path, tensors=tensors, config=content, files=files)
        sources = {rule.source for rule in rules}
        yield Cut(cut, small, config, blocks, len(sources & set(names.values())), len(sources))


def _times(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _kept_blocks(config: ViTConfig) -> tuple[int, ...]:
    last = config.num_hidden_layers - 1
    return (0, last) if last else (0,)


def _small_grid(config: ViTConfig) -> tuple[int, int]:
    rows, columns = config.grid()
    small = _SQUARE if rows == columns else _RECTANGLE if rows < columns else _RECTANGLE[::-1]
    fits = small[0] <= rows and small[1] <= columns
    return small if fits else (rows, columns)


def _cut_config(content: Mapping[str, Any], depth: int, image_hw: tuple[int, int]) -> dict[str, Any]:
    """Returns a `config.json`, Hugging Face's or timm's, with another depth and image size."""
    height, width = image_hw
    if not is_timm(content):
        one = height == width and not isinstance(content.get("image_size"), list)
        return {**content, "num_hidden_layers": depth, "image_size": height if one else [height, width]}
    arguments = {**content.get("model_args", {}), "depth": depth}
    if "img_size" in arguments:
        arguments["img_size"] = [height, width]
    # An older form has everything in one object.
    pretrained = content.get("pretrained_cfg", content)
    size = {"input_size": [pretrained.get("input_size", [3])[0], height, width]}
    if pretrained is content:
        return {**content, "model_args": arguments, **size}
    return {**content, "model_args": arguments, "pretrained_cfg": {**pretrained, **size}}


def _kept_names(tensors: mapping.Tensors, layout: Layout, blocks: tuple[int, ...]) -> dict[str, str]:
    """Returns the names of the cut's tensors, and for each the name of that tensor in the checkpoint.

    Tensors that no rule takes stay too, because the candidate's loader may need them.
    """
    stems = {rule.source.partition("{i}")[0] for rule in layout.rules if "{i}" in rule.source}
    optional = re.escape(layout.prefix)
    block = re.compile(rf"((?:{optional})?(?:{'|'.join(map(re.escape, sorted(stems)))}))(\d+)(?=[./])")
    names = {}
    for name in tensors:
        found = block.match(name)
        if found is None:
            names[name] = name
        elif int(found[2]) in blocks:
            names[f"{found[1]}{blocks.index(int(found[2]))}{name[found.end() :]}"] = name
    return names


def _corner(tensor: NDArray, rule: Rule, config: ViTConfig, small: ViTConfig) -> NDArray:
    """Returns the position embeddings of the grid's first rows and columns, in the layout's own form."""
    positions = rule.transform.to_parameter(tensor, config)
    rows, columns = small.grid()
    patches = positions[:, 1:].reshape(1, *config.grid(), -1)[:, :rows, :columns].reshape(1, rows * columns, -1)
    return np.ascontiguousarray(rule.transform.to_source(np.concatenate([positions[:, :1], patches], axis=1), small))


def _write(
    scratch: Path, source: Checkpoint, names: Mapping[str, str], tensors: mapping.Tensors, content: Any
) -> tuple[Path, tuple[Path, ...]]:
    """Writes the cut, and returns its path and its files of weights."""
    lone = source.path.is_file()
    path = scratch / (source.path.name if lone else source.path.resolve().name)
    directory = scratch if lone else path
    directory.mkdir(exist_ok=True)
    of_file: dict[str, dict[str, NDArray]] = {}
    for new, name in names.items():
        file = source.tensors.file_of(name) if isinstance(source.tensors, LazyTensors) else source.files[0]
        of_file.setdefault(file.name, {})[source.prefix + new] = tensors[new]
    for to, part in of_file.items():
        write = writing.write_safetensors if to.endswith(".safetensors") else writing.write_tensors
        write(directory / to, part)
    if not lone and not of_file.keys() & {WEIGHTS, FLAX_WEIGHTS}:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: to for to, part in of_file.items() for name in part}
        writing.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, json in ((CONFIG, content), (PREPROCESSOR, source.preprocessor)):
        if json is not None:
            writing.write_json(directory / name, json)
    return path, tuple(directory / file for file in sorted(of_file))
