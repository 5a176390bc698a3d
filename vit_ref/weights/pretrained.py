"""Loading and saving of models: `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from numpy.typing import NDArray

from vit_ref.errors import CheckpointError, ConfigError, InputError
from vit_ref.files import require_local
from vit_ref.model.attention import Attend
from vit_ref.model.config import ViTConfig
from vit_ref.model.skeleton import skeleton
from vit_ref.model.vit import VisionTransformer
from vit_ref.weights import checkpoint, layouts, mapping, partition, writing
from vit_ref.weights.partition import Kind, Rules
from vit_ref.weights.timm import from_timm, is_timm


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    config: ViTConfig | None = None,
    dtype: DTypeLike | None = None,
    ignore: Iterable[str] = (),
    mesh: Mesh | None = None,
    sharding: Kind | Rules = "data",
    attention: Attend | None = None,
) -> VisionTransformer:
    """Loads a ViT, in evaluation mode.

    Args:
      path: one of

        - a Hugging Face directory (safetensors, also sharded, or flax msgpack),
        - a timm directory (safetensors),
        - a hub id of either, also as ID@REVISION or as https://huggingface.co/ID,
        - an `.npz` of google-research's vision_transformer or big_vision.
      revision: a branch, a tag or a commit of the repository on the hub. None for the one in `path`, or the newest.
      config: replaces the checkpoint's own configuration and class names. A lone file needs it, unless it is an `.npz`.
      dtype: dtype of the computation; None to promote from pixels and parameters.
      ignore: names or patterns (`*`, `?`) of tensors in the checkpoint to leave behind.
      mesh: a mesh of many devices, with axes "data" and "model". Each device gets its part of each parameter. The host
        reads safetensors tensor by tensor, and holds one at a time. Divide the batch, too:
        `jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))`.
      sharding: division of the parameters: "data", "fsdp", "tensor" or "fsdp+tensor", or rules, see
        `vit_ref.weights.partition`.
      attention: replaces the default attention, see `VisionTransformer`, for example by
        `vit_ref.model.attention.cudnn` in half precision on NVIDIA GPUs.

    Returns:
      The model. Its parameters have the checkpoint's bits and dtypes.

    Raises:
      CheckpointError: the checkpoint cannot be found or read.
      ConfigError: this model does not support the checkpoint's configuration.
      MappingError: the checkpoint's tensors do not fit the configuration.
      InputError: the mesh does not fit the rules or the model.
    """
    if mesh is None and sharding != "data":
        raise InputError(f"sharding is {sharding!r} and mesh is None: give the mesh, too")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(f"mesh is of type {type(mesh).__name__}, which has no devices: give one of jax.make_mesh")
    ignore = tuple(ignore)
    source = checkpoint.read(path, revision=revision, lazy=mesh is not None, ignore=ignore)
    with mapping.name_checkpoint_in_errors(source.path):
        config, layout = describe_checkpoint(source, config=config, ignore=ignore)
        shardings = {} if mesh is None else partition.choose_shardings(config, mesh, sharding)
        parameters = mapping.port_each(source.tensors, config, layout, ignore=ignore)
        return _built(config, parameters, dtype, shardings, attention)


def open_checkpoint(
    path: str | os.PathLike[str], *, revision: str | None = None, ignore: Iterable[str] = (), lazy: bool = False
) -> tuple[checkpoint.Checkpoint, ViTConfig]:
    """Opens a checkpoint for callers that take its tensors by name, and reads its configuration.

    Args:
      path: a checkpoint, see `from_pretrained`.
      revision: a branch, a tag or a commit of the repository on the hub, or None.
      ignore: names or patterns of tensors to leave behind. The result does not have them.
      lazy: whether to read each tensor only when it is used.

    Returns:
      The checkpoint and its configuration.

    Raises:
      CheckpointError: the checkpoint cannot be found or read.
      ConfigError: this model does not support the checkpoint's configuration.
      MappingError: a pattern matches nothing, or the layout is unknown.
    """
    ignore = tuple(ignore)
    source = checkpoint.read(path, revision=revision, lazy=lazy, ignore=ignore)
    with mapping.name_checkpoint_in_errors(source.path):
        config = read_configuration(source, ignore)
        return dataclasses.replace(source, tensors=mapping.drop_ignored(source.tensors, config, ignore)), config


def load(
    source: checkpoint.Checkpoint, *, config: ViTConfig | None = None, ignore: Iterable[str] = ()
) -> tuple[ViTConfig, dict[str, NDArray], layouts.Layout]:
    """Returns the configuration of a checkpoint, its parameters by path, and its layout.

    Args:
      source: the checkpoint.
      config: replaces the checkpoint's own configuration.
      ignore: names or patterns of tensors to leave behind.

    Raises:
      CheckpointError: the configuration of a lone file is missing.
      ConfigError: this model does not support the configuration.
      MappingError: the checkpoint's tensors do not fit the configuration.
    """
    ignore = tuple(ignore)
    with mapping.name_checkpoint_in_errors(source.path):
        config, layout = describe_checkpoint(source, config=config, ignore=ignore)
        return config, mapping.port(source.tensors, config, layout, ignore=ignore), layout


def describe_checkpoint(
    source: checkpoint.Checkpoint, *, config: ViTConfig | None = None, ignore: Iterable[str] = ()
) -> tuple[ViTConfig, layouts.Layout]:
    """Returns the configuration of a checkpoint and its layout, without the values.

    Args:
      source: the checkpoint.
      config: replaces the checkpoint's own configuration.
      ignore: names or patterns of tensors to leave behind.

    Raises:
      CheckpointError: the configuration of a lone file is missing.
      ConfigError: this model does not support the configuration.
      MappingError: no layout recognises the names.
    """
    if config is None:
        config = read_configuration(source, ignore)
    else:
        read = {} if source.config is None or is_timm(source.config) else source.config
        extra, preprocessor = config.extra or read, config.preprocessor or source.preprocessor
        config = dataclasses.replace(config, extra=extra, preprocessor=preprocessor)
    return config, mapping.detect(source.tensors)


def read_configuration(source: checkpoint.Checkpoint, ignore: Iterable[str] = ()) -> ViTConfig:
    """Reads the configuration of a checkpoint from its `config.json`, or from the shapes of an `.npz`.

    Args:
      source: the checkpoint.
      ignore: names or patterns of tensors that the caller will leave behind.

    Raises:
      CheckpointError: the shapes of a lone file do not tell the configuration.
      ConfigError: this model does not support the configuration.
    """
    names = [name for name in source.tensors if not any(fnmatchcase(name, pattern) for pattern in ignore)]
    if source.config is not None:
        try:
            if is_timm(source.config):
                return from_timm(source.config)
            config = ViTConfig.from_hf(source.config, source.preprocessor)
        except ConfigError as error:
            directory = source.path.parent if source.path.is_file() else source.path
            raise ConfigError(f"{directory / checkpoint.CONFIG}: {error}") from None
        if not source.config.get("architectures") and not any(
            name.startswith(("classifier", "head")) for name in names
        ):
            config = dataclasses.replace(config, num_labels=0, labels=())
        pooled = not config.num_labels and any("pooler" in name for name in names)
        return dataclasses.replace(config, pooler=pooled)
    if source.path.suffix == ".npz":
        return _npz_configuration(source.path, {name: source.tensors[name].shape for name in names})
    raise CheckpointError(f"{source.path}: it has no configuration beside it: give its directory, or config=")


def _npz_configuration(path: Path, shapes: dict[str, tuple[int, ...]]) -> ViTConfig:
    """Reads the configuration from the shapes of an `.npz` of google-research's.

    The code there fixes the rest. LayerNorm has flax's epsilon 1e-6. The MLP has `nn.gelu`, which is the tanh form. And
    attention has biases (vit_jax/models_vit.py; big_vision/models/vit.py).
    """
    names, block = " ".join(shapes), "Transformer/encoderblock_0"
    if "Transformer/" in names and "cls" not in shapes:
        pooling = "attention, pool_type 'map'" if "MAPHead_0/" in names else "the mean of the patches, 'gap'"
        raise CheckpointError(
            f"{path}: it has no cls token, so it pools by {pooling}: give a checkpoint with pool_type 'tok'"
        )
    try:
        patch_height, patch_width, channels, width = shapes["embedding/kernel"]
        if mapping.detect(shapes) is layouts.BIG_VISION:
            positions = shapes["pos_embedding"][1]
            attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
        else:
            positions = shapes["Transformer/posembed_input/pos_embedding"][1] - 1
            attention, mlp = "MultiHeadDotProductAttention_1", "MlpBlock_3"
        heads = shapes[f"{block}/{attention}/query/kernel"][1]
        hidden = shapes[f"{block}/{mlp}/Dense_0/kernel"][1]
        labels = shapes["head/bias"][0] if "head/bias" in shapes else 0
        pooled = shapes["pre_logits/bias"][0] if "pre_logits/bias" in shapes else None
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path}: it is not an .npz of google-research/vision_transformer or big_vision ({error}): give another"
        ) from None
    if labels and pooled:
        raise CheckpointError(
            f"{path}: it has both a pre-logits layer and a head, and no Hugging Face ViT has both: leave one out with"
            " ignore=['head/*'] or ignore=['pre_logits/*']"
        )
    side = round(positions**0.5)
    if side * side != positions:
        raise CheckpointError(f"{path}: its {positions} positions are no square grid: give config=")
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split("/")[1] for name in shapes if "/encoderblock_" in name}),
        num_attention_heads=heads,
        intermediate_size=hidden,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=(side * patch_height, side * patch_width),
        patch_size=(patch_height, patch_width),
        num_channels=channels,
        num_labels=labels,
        pooler=pooled is not None,
        pooler_output_size=pooled,
    )


def build(
    config: ViTConfig,
    parameters: mapping.Tensors,
    *,
    dtype: DTypeLike | None = None,
    attention: Attend | None = None,
) -> VisionTransformer:
    """Builds a model with these parameters.

    Args:
      config: the model's configuration.
      parameters: path -> parameter, as `mapping.port` returns them.
      dtype: dtype of the computation; None to promote from pixels and parameters.
      attention: replaces the default attention, see `VisionTransformer`.

    Raises:
      CheckpointError: a parameter is float64, and jax would silently make it float32.
    """
    return _built(config, parameters.items(), dtype, {}, attention)


def _built(
    config: ViTConfig,
    parameters: Iterable[tuple[str, NDArray]],
    dtype: DTypeLike | None,
    shardings: Mapping[str, NamedSharding],
    attention: Attend | None = None,
) -> VisionTransformer:
    arrays = {}
    for path, value in parameters:
        if value.dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise CheckpointError("the weights are float64, which jax would truncate: set jax_enable_x64 first")
        arrays[path] = _placed(value, shardings.get(path))
        del value  # before the iterator makes the next one
    graph, shapes = skeleton(config, dtype, attention)
    model = nnx.merge(graph, replace_arrays(shapes, arrays))
    model.eval()
    return model


def _placed(value: NDArray, sharding: NamedSharding | None = None) -> jax.Array:
    # A copy, because jax may use the array's own memory, and a later write to that would change the model.
    if sharding is None:
        return jnp.array(value, copy=True)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index]))


def replace_arrays(like: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """Returns a state with these arrays, or other values such as shardings, by path in place of its own."""
    return nnx.from_flat_state(
        [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(like)]
    )


def get_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """Returns the arrays of a state by path, on their devices."""
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def get_parameters(model: VisionTransformer) -> dict[str, NDArray]:
    """Returns the parameters of a model by path, on the host."""
    return get_state_parameters(nnx.state(model, nnx.Param))


def get_state_parameters(state: nnx.State) -> dict[str, NDArray]:
    """Returns the arrays of a state, such as a gradient, by path, on the host."""
    return {path: np.asarray(array) for path, array in get_arrays(state).items()}


def save_pretrained(
    model: VisionTransformer, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes a Hugging Face directory that transformers loads: safetensors with the names of transformers 4.

    It holds the configuration, the class names and the preprocessing of the model's checkpoint, too. A model without
    preprocessing leaves an existing file in place, with a warning.

    transformers' `ViTModel` adds a pooler to a model without one: load that with `add_pooling_layer=False`. FlaxViT
    does not read shards.

    With many devices the function gathers one tensor at a time. With several processes it depends on the parameters:

    - If they are divided between processes, all processes have to call this. The first writes, and all raise if it
      cannot.
    - If each process has them whole, only the first writes, and the others need not call this.

    Args:
      model: any model of this package.
      directory: the directory, which is made if it does not exist.
      max_shard_size: size of a file, in bytes or as text, above which the weights are split into shards with an index.

    Raises:
      CheckpointError: the directory cannot be written.
      InputError: the directory is a URL.
    """
    require_local(directory, "directory")
    config, layout = model.config, layouts.HF
    arrays = get_arrays(nnx.state(model, nnx.Param))

    def tensor(rule: layouts.Rule) -> writing.Deferred:
        array = arrays[rule.destination]
        shape = mapping.compute_source_shape(rule, array.shape, config)
        return writing.Deferred(shape, array.dtype, lambda: rule.transform.to_source(_on_host(array), config))

    tensors = {rule.source: tensor(rule) for rule in layout.bind(config, prefixed=bool(config.num_labels))}

    def write(tensors: Mapping[str, writing.Deferred]) -> None:
        content = hf_config(config, tensors)
        writing.write_directory(directory, tensors, content, config.preprocessor, max_shard_size=max_shard_size)

    if not all(_is_here(array) for array in arrays.values()):
        _write_together(tensors, writing.order_names(tensors, max_shard_size), write, directory)
    elif jax.process_index() == 0 or all(array.is_fully_addressable for array in arrays.values()):
        write(tensors)


def _write_together(
    tensors: Mapping[str, writing.Deferred],
    order: Sequence[str],
    write: Callable[[Mapping[str, writing.Deferred]], None],
    directory: str | os.PathLike[str],
) -> None:
    """Lets the first process write what all make together. If it cannot, the others do not wait for it."""
    made: set[str] = set()
    fault: Exception | None = None

    def noted(name: str) -> writing.Deferred:
        def make() -> NDArray:
            made.add(name)
            return tensors[name].make()

        return tensors[name]._replace(make=make)

    if jax.process_index() == 0:
        try:
            write({name: noted(name) for name in tensors})
        except Exception as error:  # of any kind, because the others wait
            fault = error
    for name in order:
        if name not in made:
            tensors[name].make()
    failed = multihost_utils.broadcast_one_to_all(np.array(fault is not None))
    if fault is not None:
        raise fault
    if failed:
        raise CheckpointError(f"{os.fspath(directory)}: the first process could not write: see its own message")


def _is_here(array: jax.Array) -> bool:
    """Tells whether this process has the whole array, and need not gather it."""
    return array.is_fully_addressable or array.is_fully_replicated


def _on_host(array: jax.Array) -> NDArray:
    """Returns the whole of an array from its shards. The array itself would keep the copy."""
    if not _is_here(array):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


# Entries of config.json that describe tensors stored in another way than this package's.
_OF_OTHER_TENSORS = frozenset({"quantization_config", "pruned_heads"})


def hf_config(config: ViTConfig, tensors: Mapping[str, NDArray | writing.Deferred]) -> dict[str, Any]:
    """Returns the Hugging Face `config.json` for these tensors.

    It states their dtype, or for several the one that holds them all. Otherwise transformers may cast every tensor to a
    dtype that the file stated before. It does not state that tensors are quantised or heads are missing. Otherwise
    transformers would quantise or prune what it loads.
    """
    content = {name: value for name, value in config.to_hf().items() if name not in _OF_OTHER_TENSORS}
    dtypes = {np.dtype(tensor.dtype) for tensor in tensors.values()}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    # float16 and bfloat16 do not hold each other.
    halves = len(dtypes) > 1 and widest.itemsize == 2
    # Old versions of transformers know only "torch_dtype". Later ones write "dtype" and read both.
    for key in [key for key in ("torch_dtype", "dtype") if key in content] or ["torch_dtype"]:
        content[key] = "float32" if halves else str(widest)
    return content
