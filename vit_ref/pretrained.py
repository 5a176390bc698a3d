"""From a checkpoint to a model and back: `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref import checkpoint, porting
from vit_ref.config import ViTConfig
from vit_ref.errors import CheckpointError
from vit_ref.model import VisionTransformer


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    config: ViTConfig | None = None,
    dtype: DTypeLike | None = None,
    exempt: Iterable[str] = (),
) -> VisionTransformer:
    """Loads a ViT, in evaluation mode.

    Args:
      path: a Hugging Face directory (safetensors, also sharded, or flax msgpack), a hub id, or an `.npz` of
        google-research/vision_transformer.
      config: takes the place of the checkpoint's own, class names included; needed for a lone file other than `.npz`.
      dtype: dtype of the computation, None to promote from pixels and parameters.
      exempt: names or patterns of tensors in the checkpoint to leave behind on purpose.

    Returns:
      The model; its parameters have the checkpoint's own bits and dtypes.

    Raises:
      CheckpointError: the checkpoint cannot be found or read.
      ConfigError: its configuration is none that this model can honour.
      PortError: its tensors do not fit the configuration.
    """
    source = checkpoint.read(path)
    exempt = tuple(exempt)
    if config is None:
        config = configuration(source, exempt)
    else:
        extra, preprocessor = config.extra or source.config or {}, config.preprocessor or source.preprocessor
        config = dataclasses.replace(config, extra=extra, preprocessor=preprocessor)
    layout = porting.detect(source.tensors)
    return build(config, porting.port(source.tensors, config, layout, exempt=exempt), dtype=dtype)


def configuration(source: checkpoint.Checkpoint, exempt: Iterable[str] = ()) -> ViTConfig:
    """The configuration of a checkpoint: its `config.json` where there is one, else what an `.npz`'s shapes say.

    Args:
      source: the checkpoint.
      exempt: names or patterns of tensors that will be left behind.

    Raises:
      CheckpointError: a lone file whose shapes do not tell.
      ConfigError: see `ViTConfig`.
    """
    names = [name for name in source.tensors if not any(fnmatchcase(name, pattern) for pattern in exempt)]
    if source.config is not None:
        config = ViTConfig.from_hf(source.config, source.preprocessor)
        if not source.config.get("architectures") and not any(
            name.startswith(("classifier", "head")) for name in names
        ):
            config = dataclasses.replace(config, num_labels=0, labels=())
        pooled = not config.num_labels and any("pooler" in name for name in names)
        return dataclasses.replace(config, pooler=pooled)
    if source.path.suffix == ".npz":
        return _npz_configuration(source.path, {name: source.tensors[name].shape for name in names})
    raise CheckpointError(f"{source.path}: no configuration beside a lone file: give its directory, or config=")


def _npz_configuration(path: Path, shapes: dict[str, tuple[int, ...]]) -> ViTConfig:
    """What the shapes of a google-research/vision_transformer `.npz` say; the rest is fixed in that code.

    Its LayerNorm has flax's epsilon, 1e-6, and its MLP `nn.gelu`, which is the tanh form (vit_jax/models_vit.py).
    """
    try:
        patch_height, patch_width, channels, width = shapes["embedding/kernel"]
        positions = shapes["Transformer/posembed_input/pos_embedding"][1] - 1
        first = "Transformer/encoderblock_0"
        heads = shapes[f"{first}/MultiHeadDotProductAttention_1/query/kernel"][1]
        mlp = shapes[f"{first}/MlpBlock_3/Dense_0/kernel"][1]
        labels = shapes["head/bias"][0] if "head/bias" in shapes else 0
        pooled = shapes["pre_logits/bias"][0] if "pre_logits/bias" in shapes else None
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not an .npz of google-research/vision_transformer ({error})") from None
    if labels and pooled:
        raise CheckpointError(
            f"{path}: it has both a pre-logits layer and a head, and no Hugging Face ViT has: leave one behind with"
            " exempt=['head/*'] or exempt=['pre_logits/*']"
        )
    side = round(positions**0.5)
    if side * side != positions:
        raise CheckpointError(f"{path}: {positions} positions are no square grid: pass config=")
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split("/")[1] for name in shapes if "/encoderblock_" in name}),
        num_attention_heads=heads,
        intermediate_size=mlp,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=(side * patch_height, side * patch_width),
        patch_size=(patch_height, patch_width),
        num_channels=channels,
        num_labels=labels,
        pooler=pooled is not None,
        pooler_output_size=pooled,
    )


def build(config: ViTConfig, parameters: porting.Tensors, *, dtype: DTypeLike | None = None) -> VisionTransformer:
    """A model with these parameters.

    Args:
      config: the model.
      parameters: by path, as `porting.port` returns them.
      dtype: dtype of the computation.

    Raises:
      CheckpointError: a parameter is float64 while jax would silently make it float32.
    """
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    if not x64 and any(value.dtype == np.float64 for value in parameters.values()):
        raise CheckpointError("the weights are float64, which jax would truncate: set jax_enable_x64 first")
    abstract = nnx.eval_shape(lambda: VisionTransformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    # A copy: jax may otherwise alias the array's memory, and whoever wrote to that would change the model.
    filled = [
        (path, variable.replace(jnp.array(parameters[".".join(map(str, path))], copy=True))) for path, variable in flat
    ]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    model.eval()
    return model


def parameters_of(model: VisionTransformer) -> dict[str, NDArray]:
    """A model's parameters by path, on the host."""
    return parameters_of_state(nnx.state(model, nnx.Param))


def parameters_of_state(state: nnx.State) -> dict[str, NDArray]:
    """The arrays of a state, such as a gradient, by path, on the host."""
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def save_pretrained(
    model: VisionTransformer, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a Hugging Face directory that transformers loads: safetensors with transformers-4 names.

    The configuration, the class names and the preprocessing that the model was loaded with go along. transformers'
    `ViTModel` makes up a pooler for a headless model that has none: load that with `add_pooling_layer=False`. FlaxViT
    reads no shards.

    Args:
      model: any model of this package.
      directory: where to; made if need be.
      max_shard_size: larger weights are split into shards with an index.

    Raises:
      CheckpointError: the directory cannot be written.
    """
    tensors = porting.export(parameters_of(model), model.config, porting.HF)
    config = model.config.to_hf()
    config.setdefault("torch_dtype", str(next(iter(tensors.values())).dtype))
    checkpoint.write_directory(directory, tensors, config, model.config.preprocessor, max_shard_size=max_shard_size)
