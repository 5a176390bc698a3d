"""A reference for `compare`: the model of transformers that a checkpoint's config.json names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_ref.errors import CheckpointError, first_line
from vit_ref.verify.candidates.declaration import Reference

# By model_type, the class of the part that takes images. For other types transformers chooses the class.
_CLASSES = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "deit": "DeiTForImageClassificationWithTeacher",
}


def load(checkpoint: Path | None) -> Any:
    """Loads the model from a directory of transformers, in evaluation mode.

    Raises:
      CheckpointError: there is no such directory, or transformers cannot load it.
    """
    if checkpoint is None:
        raise CheckpointError("no checkpoint is given: give --checkpoint a directory of transformers")
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint}: it has no config.json: give --checkpoint a directory of transformers")
    import transformers

    kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
    try:
        return getattr(transformers, _CLASSES.get(kind, "AutoModel")).from_pretrained(checkpoint).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint}: transformers cannot load a model of model_type {kind!r} ({first_line(error)}): declare a"
            " vit_ref.Reference whose load does"
        ) from None


reference = Reference(
    load=load,
    name="transformers",
    adapt=lambda **inputs: {
        name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for name, value in inputs.items()
    },
)
