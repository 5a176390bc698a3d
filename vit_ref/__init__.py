"""A Vision Transformer in Flax NNX, and the suite that proves weight ports numerically right."""

from typing import TYPE_CHECKING, Any

from vit_ref.lazy import import_on_use

if TYPE_CHECKING:
    from vit_ref.errors import CheckpointError, ConfigError, InputError, MappingError
    from vit_ref.model.config import ViTConfig
    from vit_ref.model.vit import VisionTransformer
    from vit_ref.testing.parametrize import parametrize_with_checks
    from vit_ref.verify.candidates.declaration import Candidate, Reference
    from vit_ref.verify.pairs.session import compare
    from vit_ref.verify.proposals.proposal import propose
    from vit_ref.verify.results import CandidateReport
    from vit_ref.verify.session import check_port
    from vit_ref.weights.pretrained import from_pretrained, save_pretrained

# A name is imported when it is first used: the command and pytest's plugin start without waiting for jax.
_HOME = {
    "Candidate": "vit_ref.verify.candidates.declaration",
    "Reference": "vit_ref.verify.candidates.declaration",
    "CheckpointError": "vit_ref.errors",
    "ConfigError": "vit_ref.errors",
    "InputError": "vit_ref.errors",
    "MappingError": "vit_ref.errors",
    "CandidateReport": "vit_ref.verify.results",
    "ViTConfig": "vit_ref.model.config",
    "VisionTransformer": "vit_ref.model.vit",
    "check_port": "vit_ref.verify.session",
    "compare": "vit_ref.verify.pairs.session",
    "from_pretrained": "vit_ref.weights.pretrained",
    "parametrize_with_checks": "vit_ref.testing.parametrize",
    "preprocessing": "vit_ref.preprocessing",
    "propose": "vit_ref.verify.proposals.proposal",
    "save_pretrained": "vit_ref.weights.pretrained",
}

__all__ = [
    "Candidate",
    "CandidateReport",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "MappingError",
    "Reference",
    "ViTConfig",
    "VisionTransformer",
    "check_port",
    "compare",
    "from_pretrained",
    "parametrize_with_checks",
    "propose",
    "save_pretrained",
]


_find, __dir__ = import_on_use(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vit-ref")
    return _find(name)
