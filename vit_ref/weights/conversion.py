"""Conversion of a checkpoint to another layout. The result is read back and compared before it gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from vit_ref.errors import CheckpointError, ConfigError, InputError, MappingError
from vit_ref.files import require_local
from vit_ref.model.config import ViTConfig
from vit_ref.preprocessing import Steps, steps
from vit_ref.weights import checkpoint, layouts, mapping, writing
from vit_ref.weights.pretrained import hf_config, load, read_configuration
from vit_ref.weights.timm import to_timm

Target = Literal["hf", "flax", "npz", "big_vision", "timm"]

# These do not change what a model computes in evaluation mode. Only Hugging Face's layouts can store most of them.
_TRAINING_ONLY = frozenset(
    {"hidden_dropout_prob", "attention_probs_dropout_prob", "broadcast_attention_dropout", "initializer_range"}
)
_ONE_FUNCTION = {"gelu_new": "gelu_pytorch_tanh", "gelu_python": "gelu", "swish": "silu"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion. `str()` gives one line.

    Attributes:
      source: the directory or file that was read.
      destination: the directory or file that was written.
      read: layout of the source.
      written: layout of the destination.
      tensors: number of tensors that were written.
      left_behind: properties of the source that the other layout cannot store. They change no output of the model.
    """

    source: Path
    destination: Path
    read: str
    written: str
    tensors: int
    left_behind: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, as JSON takes them."""
        return {**dataclasses.asdict(self), "source": str(self.source), "destination": str(self.destination)}

    def __str__(self) -> str:
        lost = f"; the layout cannot store: {', '.join(self.left_behind)}" if self.left_behind else ""
        return (
            f"{self.source} ({self.read}) -> {self.destination} ({self.written}): {self.tensors} tensors, read back,"
            f" every parameter the same to the last bit{lost}"
        )


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Target,
    *,
    config: ViTConfig | None = None,
    ignore: Iterable[str] = (),
) -> Conversion:
    """Writes a checkpoint in another layout.

    "hf", "flax" and "timm" are directories, "npz" and "big_vision" are one file. The function writes the result under
    another name beside the destination, and reads it back as `from_pretrained` does. It renames the result only if
    every parameter has the same bits and dtype, and if the configuration computes the same. It never overwrites a file.

    So it refuses a checkpoint that a reader of the layout would take for another model:

    - An `.npz` stores no configuration. Its readers assume epsilon 1e-6, tanh GELU and a square grid.
    - timm assumes epsilon 1e-6 too, and has no pooler.
    - FlaxViT takes only squares.
    - big_vision has no position for the cls token.

    Args:
      source: any path or hub id that `from_pretrained` reads.
      destination: a path that does not exist. Beside an `.npz` there may be no `config.json` either.
      to: the layout.
      config: replaces the checkpoint's own configuration. Give one to convert to a layout whose readers assume other
        numerics.
      ignore: names or patterns of tensors in the source to leave behind.

    Returns:
      A description of the conversion.

    Raises:
      CheckpointError: the source cannot be read, the destination cannot be written, or the layout cannot store the
        checkpoint.
      ConfigError: this model does not support the configuration.
      MappingError: the source's tensors do not fit the configuration.
    """
    if to not in get_args(Target):
        raise CheckpointError(f"layout is {to!r}: give one of {', '.join(get_args(Target))}")
    require_local(destination, "destination")
    destination = Path(destination)
    one_file = to in ("npz", "big_vision")
    _require_room(destination, to, one_file)
    ignore = tuple(ignore)
    opened = checkpoint.read(source, ignore=ignore)
    config, parameters, read = load(opened, config=config, ignore=ignore)
    try:
        tensors = mapping.export(parameters, config, layouts.LAYOUTS[to])
    except MappingError as error:
        reasons = [f"{fault.name}: {fault.detail}" for fault in error.faults]
        raise _unfit(destination, to, "; ".join(reasons)) from None
    made: list[Path] = []
    try:
        for parent in reversed(destination.parents):
            if not os.path.isdir(parent):
                with contextlib.suppress(FileExistsError):  # another process may make it, too
                    parent.mkdir()
                    made.insert(0, parent)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=destination.parent) as stage:
            # The destination's own name may be too long for another one derived from it.
            staged = Path(stage, "result.npz" if one_file else "result")
            try:
                _WRITERS[to](staged, tensors, config)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(staged), str(destination))) from None
            try:
                again = _read_back(staged, to, config, parameters)
            except InputError as error:
                raise _unfit(destination, to, str(error).replace(str(staged), "read back")) from None
            os.rename(staged, destination)
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{destination}: it cannot be written ({error}): give another place") from None
    return Conversion(opened.path, destination, read.name, to, len(tensors), _left_behind(config, again))


def _unfit(destination: Path, to: Target, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{destination}: layout {to} cannot hold this checkpoint: {reason}: write layout hf, which can hold all"
    )


def _require_room(destination: Path, to: Target, one_file: bool) -> None:
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: it exists already, and is not overwritten: give another name")
    if not one_file:
        if destination.suffix == ".npz":
            raise CheckpointError(f"{destination}: the layout {to} is a directory: give a name without .npz")
        return
    if destination.suffix != ".npz":
        raise CheckpointError(f"{destination}: the layout {to} is one file: name it {destination}.npz")
    for name in (checkpoint.CONFIG, checkpoint.PREPROCESSOR):
        if os.path.exists(destination.parent / name):  # Path.exists would raise for a name that is too long
            raise CheckpointError(
                f"{destination}: a reader would take the {name} in this directory for this file's: name a file in a"
                " directory without one"
            )


def _write_npz(place: Path, tensors: mapping.Tensors, config: ViTConfig) -> None:
    writing.write_tensors(place, tensors)


def _write_hf(place: Path, tensors: mapping.Tensors, config: ViTConfig) -> None:
    writing.write_directory(place, tensors, hf_config(config, tensors), config.preprocessor)


def _write_flax(place: Path, tensors: mapping.Tensors, config: ViTConfig) -> None:
    place.mkdir()
    writing.write_tensors(place / checkpoint.FLAX_WEIGHTS, tensors)
    writing.write_json(place / checkpoint.CONFIG, hf_config(config, tensors))
    if config.preprocessor is not None:
        writing.write_json(place / checkpoint.PREPROCESSOR, config.preprocessor)


def _write_timm(place: Path, tensors: mapping.Tensors, config: ViTConfig) -> None:
    # timm does not read shards.
    size = sum(tensor.nbytes for tensor in tensors.values())
    writing.write_directory(place, tensors, to_timm(config), max_shard_size=size)


_WRITERS: dict[str, Callable[[Path, mapping.Tensors, ViTConfig], None]] = {
    "hf": _write_hf,
    "flax": _write_flax,
    "npz": _write_npz,
    "big_vision": _write_npz,
    "timm": _write_timm,
}


def _read_back(staged: Path, to: Target, config: ViTConfig, parameters: mapping.Tensors) -> ViTConfig:
    """Reads back what was written, compares it with what should have been, and returns its configuration."""
    opened = checkpoint.read(staged)
    again = read_configuration(opened)
    meant, said = _numerics(config), _numerics(again)
    changed = [f"{name} {said[name]!r} for {meant[name]!r}" for name in meant if said[name] != meant[name]]
    if changed:
        raise CheckpointError(f"its readers assume {', '.join(changed)}")
    if to == "flax" and any(height != width for height, width in (config.image_hw, config.patch_hw)):
        # This package would read it, but transformers computes the number of patches from one side.
        raise CheckpointError(f"FlaxViT takes only squares, not {config.image_hw} and patches of {config.patch_hw}")
    values = mapping.port(opened.tensors, again, mapping.detect(opened.tensors))
    for path, value in parameters.items():
        if values[path].dtype != value.dtype or values[path].tobytes() != value.tobytes():
            raise OSError(f"{path} came back with other bits")
    return again


def _numerics(config: ViTConfig) -> dict[str, Any]:
    """Returns the fields that decide what a model computes in evaluation mode, with one name for each function."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.compare and field.name not in _TRAINING_ONLY
    }
    for name in ("hidden_act", "pooler_act"):
        fields[name] = _ONE_FUNCTION.get(fields[name], fields[name])
    fields["pooler_output_size"] = config.pooler_width
    if not config.pooler:
        fields["pooler_act"] = fields["pooler_output_size"] = None
    return fields


def _left_behind(config: ViTConfig, again: ViTConfig) -> tuple[str, ...]:
    def dropout(config: ViTConfig) -> tuple[float, float]:
        return config.hidden_dropout_prob, config.attention_probs_dropout_prob

    lost = {
        "class names": config.labels and config.labels != again.labels,
        # Without it `predict` would take the classes for exclusive ones.
        "problem_type": config.extra.get("problem_type") != again.extra.get("problem_type"),
        "preprocessing": _pixels(config) != _pixels(again),
        "dropout rates": dropout(config) != dropout(again),
    }
    return tuple(name for name, is_lost in lost.items() if is_lost)


def _pixels(config: ViTConfig) -> Steps | Any:
    """Returns the preprocessing steps, or the file's content if this package would refuse it."""
    try:
        return steps(config)
    except ConfigError:
        return config.preprocessor
