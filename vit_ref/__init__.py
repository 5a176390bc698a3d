"""A Vision Transformer in Flax NNX, and the suite that proves weight ports numerically right."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vit_ref.config import ViTConfig
from vit_ref.errors import CheckpointError, ConfigError, InputError
from vit_ref.model import VisionTransformer
from vit_ref.porting import PortError
from vit_ref.pretrained import from_pretrained, save_pretrained

if TYPE_CHECKING:
    from vit_ref.verify.check import check_port
    from vit_ref.verify.port_report import PortReport
    from vit_ref.verify.ports.declaration import Candidate
    from vit_ref.verify.ports.proposal import propose

__version__ = version("vit-ref")

# The engine is imported when it is asked for: who loads a model does not wait for it.
_OF_THE_ENGINE = {
    "Candidate": "vit_ref.verify.ports.declaration",
    "PortReport": "vit_ref.verify.port_report",
    "check_port": "vit_ref.verify.check",
    "propose": "vit_ref.verify.ports.proposal",
}

__all__ = [
    "Candidate",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "PortError",
    "PortReport",
    "ViTConfig",
    "VisionTransformer",
    "check_port",
    "from_pretrained",
    "propose",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _OF_THE_ENGINE:
        return getattr(import_module(_OF_THE_ENGINE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
