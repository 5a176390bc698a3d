"""`ViTConfig`: every field that changes what a Vision Transformer computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vit_ref.errors import ConfigError

# Activations by their Hugging Face names. Three pairs are one function each: gelu_new and gelu_pytorch_tanh, silu and
# swish, gelu and gelu_python.
ACTIVATION_NAMES = (
    "gelu",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)

# Width, depth, MLP width, heads. Ti, S: DeiT (Touvron et al., 2021, table 1). B, L, H: ViT (Dosovitskiy et al., 2021,
# table 1).
_VARIANTS = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}

# Fields of a Hugging Face config that are not simply read and written by name.
_NOT_BY_NAME = frozenset({"pooler", "labels", "extra", "preprocessor", "num_labels", "broadcast_attention_dropout"})

_POSITIVE_INTEGERS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
)


# Larger than any real transformer. A larger number gets an error at once, and not after hours of building.
_DEEPEST, _WIDEST = 1024, 2**20


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Reads (height, width) from an int or a pair, because Hugging Face configs have either."""
    height, width = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= _WIDEST:
            raise ConfigError(f"{name} is {value!r}: give a positive integer of at most {_WIDEST}, or (height, width)")
    return height, width


# What to do with a checkpoint of another model.
_ANOTHER_MODEL = (
    "A candidate of another model is compared with transformers' by: vit-ref compare vit_ref.verify.pairs.pretrained"
    " CANDIDATE.py --checkpoint PATH --shape pixel_values=2,HEIGHT,WIDTH,3"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Configuration of a Vision Transformer. Names, meanings and defaults are those of Hugging Face's `ViTConfig`.

    Attributes:
      hidden_size: width D of the token stream.
      num_hidden_layers: number of blocks.
      num_attention_heads: number of heads H. D has to be a multiple of H.
      intermediate_size: width of the MLP's hidden layer.
      hidden_act: activation of the MLP, one of `ACTIVATION_NAMES`. "gelu" is the exact (erf) form.
      layer_norm_eps: number that every LayerNorm adds to the variance.
      qkv_bias: whether query, key and value have biases.
      hidden_dropout_prob: dropout rate after the embeddings, the attention output and the MLP output, in training.
      attention_probs_dropout_prob: dropout rate of the attention probabilities, in training.
      broadcast_attention_dropout: whether all images and heads of a batch share one mask of the attention
        probabilities, as in FlaxViT. By default each has its own, as in PyTorch. No checkpoint holds this field.
      image_size: (height, width) in pixels of the images that the position embeddings belong to. An int means a square.
      patch_size: (height, width) of a patch in pixels. An int means a square.
      num_channels: number of channels of an image.
      initializer_range: standard deviation of newly initialised kernels, cls token and position embeddings.
      num_labels: number of classes of the head; 0 for no head.
      pooler: whether a model without a head ends in a dense layer and an activation on the cls token. The reference's
        `ViTModel` has one, its classifiers have none.
      pooler_output_size: width of the pooler; None for `hidden_size`.
      pooler_act: activation of the pooler.
      labels: names of the classes in the order of their ids, or () if the checkpoint has none.
      extra: the content of `config.json`. It changes no numerics, and goes into saved checkpoints.
      preprocessor: the content of `preprocessor_config.json`. It goes into saved checkpoints, and
        `vit_ref.preprocessing` follows it.

    Raises:
      ConfigError: a value is out of range, unknown, or contradicts another.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    broadcast_attention_dropout: bool = False
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    initializer_range: float = 0.02
    num_labels: int = 1000
    pooler: bool = False
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    # These fields take no part in equality or hashing, so two models that differ only in them share one compiled
    # function.
    labels: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    preprocessor: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        object.__setattr__(self, "patch_size", _pair("patch_size", self.patch_size))
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in (*_POSITIVE_INTEGERS, "num_labels", "pooler_output_size"):
            value = getattr(self, name)
            if value is None and name == "pooler_output_size":
                continue
            least, most = 0 if name == "num_labels" else 1, _DEEPEST if name == "num_hidden_layers" else _WIDEST
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{name} is {value!r}: give an integer of at least {least} and at most {most}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}:"
                " change one of them"
            )
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACTIVATION_NAMES:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(ACTIVATION_NAMES)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not _is_real(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give a probability, 0 <= p < 1")
        for name in ("layer_norm_eps", "initializer_range"):
            if not _is_real(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give a positive number")
        for name in ("qkv_bias", "pooler", "broadcast_attention_dropout"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give true or false")
        for axis, image, patch in zip(("height", "width"), self.image_hw, self.patch_hw, strict=True):
            if image % patch:
                raise ConfigError(f"image {axis} {image} is not a multiple of the patch {axis} {patch}: change it")
        if self.pooler and self.num_labels:
            raise ConfigError(
                "pooler and num_labels are both set, and the reference's classifiers have no pooler: set pooler=False"
                " or num_labels=0"
            )
        if self.labels and len(self.labels) != self.num_labels:
            raise ConfigError(
                f"there are {len(self.labels)} labels and num_labels is {self.num_labels}: give one name per class"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image (height, width) in pixels."""
        return self.image_size  # type: ignore[return-value]  # __post_init__ made it a pair

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Patch (height, width) in pixels."""
        return self.patch_size  # type: ignore[return-value]  # __post_init__ made it a pair

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pooler_width(self) -> int:
        """Width of the pooler's output."""
        return self.pooler_output_size or self.hidden_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """`labels`, or Hugging Face's LABEL_0, LABEL_1 and so on if the checkpoint has none; () without a head."""
        return self.labels or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def grid(self, image_hw: tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns (rows, columns) of patches in an image.

        Args:
          image_hw: (height, width) of the image in pixels; None for the configuration's own size.
        """
        height, width = image_hw or self.image_hw
        return height // self.patch_hw[0], width // self.patch_hw[1]

    @classmethod
    def variant(cls, name: str, **overrides: Any) -> ViTConfig:
        """Returns the configuration of a published variant, such as "Ti/16", "S/16", "B/16", "B/32", "L/16", "H/14".

        Args:
          name: size (Ti, S, B, L or H), a slash, and the side of a patch in pixels.
          **overrides: values of other fields.

        Raises:
          ConfigError: the name is unknown, or a value is out of range.
        """
        size, _, patch = name.partition("/")
        if size not in _VARIANTS or not patch.isdecimal():
            raise ConfigError(f"variant is {name!r}: give one of {', '.join(_VARIANTS)}, a slash and a patch size")
        width, depth, mlp, heads = _VARIANTS[size]
        fields: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "patch_size": int(patch),
        }
        return cls(**{**fields, **overrides})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> ViTConfig:
        """Reads the configuration from a Hugging Face `config.json`.

        Args:
          config: the parsed JSON object.
          preprocessor: the parsed `preprocessor_config.json`, or None if there is none.

        Raises:
          ConfigError: the configuration is not that of a ViT, or this package does not support a value.
        """
        model_type = config.get("model_type")
        if model_type == "deit":
            # Each DeiT has embeddings.distillation_token (transformers' DeiTEmbeddings), which attention sees.
            raise ConfigError(
                "model_type is 'deit', which has a second class token for distillation, and this model has one class"
                " token: use a DeiT without it, such as facebook/deit-base-patch16-224, whose model_type is 'vit'."
                f" {_ANOTHER_MODEL}"
            )
        if model_type != "vit":
            raise ConfigError(
                f"model_type is {model_type!r}: give a checkpoint whose model_type is 'vit'. {_ANOTHER_MODEL}"
            )
        fields = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config.keys() - _NOT_BY_NAME}
        architectures = config.get("architectures") or []
        if not isinstance(architectures, list):
            raise ConfigError(f"architectures is {architectures!r}: give a list of class names")
        headless = bool(architectures) and not any("ForImageClassification" in str(name) for name in architectures)
        labels = () if headless else _labels(config.get("id2label"))
        # Hugging Face's own default is two, if a config has neither labels nor their number.
        num_labels = 0 if headless else (len(labels) or config.get("num_labels", 2))
        return cls(**fields, num_labels=num_labels, labels=labels, extra=dict(config), preprocessor=preprocessor)

    def hf_numerics(self) -> dict[str, Any]:
        """Returns the arguments with which transformers' `ViTConfig` describes this model, and no others.

        Other entries of a `config.json` may change what transformers returns, refuses or loads, but nothing that it
        computes in evaluation mode. Examples are `return_dict`, `quantization_config`, `pruned_heads`, `problem_type`
        and `torch_dtype`. Classes have no names here. FlaxViT does not know "gelu_python", so that becomes "gelu".
        """
        arguments = dataclasses.replace(self, extra={}, labels=()).to_hf()
        del arguments["architectures"], arguments["model_type"]
        for name in ("hidden_act", "pooler_act"):
            if arguments[name] == "gelu_python":
                arguments[name] = "gelu"
        return arguments

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` of this configuration: the content that was read, with every changed field."""
        config: dict[str, Any] = {"model_type": "vit", **self.extra}
        for field in dataclasses.fields(self):
            if field.name not in _NOT_BY_NAME:
                config[field.name] = getattr(self, field.name)
        for name, (height, width) in (("image_size", self.image_hw), ("patch_size", self.patch_hw)):
            config[name] = height if height == width else [height, width]
        if self.pooler_output_size is None:
            del config["pooler_output_size"]
        config["architectures"] = ["ViTForImageClassification" if self.num_labels else "ViTModel"]
        if self.num_labels and self.labels != _labels(config.get("id2label")):
            config.pop("id2label", None)
            config.pop("label2id", None)
        if self.num_labels and "id2label" not in config:
            config["id2label"] = {str(i): name for i, name in enumerate(self.class_names)}
            config["label2id"] = {name: i for i, name in enumerate(self.class_names)}
        config.pop("num_labels", None)
        return config


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _labels(id2label: Mapping[Any, Any] | None) -> tuple[str, ...]:
    """Returns class names in the order of their ids, or () if there are none.

    Their number is the number of entries, as in transformers. An id below it without a name gets Hugging Face's name. A
    name whose id is not below it belongs to no output of the head, and is dropped.
    """
    if not id2label:
        return ()
    try:
        by_id = {int(i): str(name) for i, name in id2label.items()}
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"id2label is not a mapping from class ids to names ({error}): give one, such as {{'0': 'cat'}}"
        ) from None
    return tuple(by_id.get(i, f"LABEL_{i}") for i in range(len(by_id)))
