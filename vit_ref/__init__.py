"""A Vision Transformer in Flax NNX, and the suite that proves weight ports numerically right."""

from importlib.metadata import version

from vit_ref.config import ViTConfig
from vit_ref.errors import CheckpointError, ConfigError, InputError
from vit_ref.model import VisionTransformer
from vit_ref.porting import PortError
from vit_ref.pretrained import from_pretrained, save_pretrained

__version__ = version("vit-ref")

__all__ = [
    "CheckpointError",
    "ConfigError",
    "InputError",
    "PortError",
    "ViTConfig",
    "VisionTransformer",
    "from_pretrained",
    "save_pretrained",
]
