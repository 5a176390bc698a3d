"""The dtypes that a safetensors header names, looked at before the library reads: NumPy has no array for some of them.

The library then raises whatever NumPy does, or calls the file damaged, which it is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_ref.errors import CheckpointError

# By their names in the header (https://huggingface.co/docs/safetensors). NumPy reads BF16 by ml_dtypes.
READABLE = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"})
# The library refuses a longer header, too.
_LONGEST = 100_000_000


def require_readable(file: Path) -> None:
    """Raises `CheckpointError` where a safetensors file stores a tensor in a dtype that cannot be read here.

    A header that is damaged is no fault here: the library says so when it reads the file.
    """
    stored = _stored_dtypes(file)
    strange = {name: dtype for name, dtype in stored.items() if dtype not in READABLE}
    if not strange:
        return
    name, dtype = next(iter(strange.items()))
    others = f" ({len(strange)} of {len(stored)} tensors are like it)" if len(strange) > 1 else ""
    raise CheckpointError(
        f"{file}: {name} is stored as {dtype}{others}, {_meaning(dtype)}: save the weights as float32 or bfloat16 with"
        " the library that quantised them, or take the checkpoint from before it was quantised"
    )


def _meaning(dtype: str) -> str:
    kind = {"F8": "float8", "F6": "float6", "F4": "float4"}.get(dtype.partition("_")[0])
    return f"which is {kind}" if kind else "which vit_ref does not know"


def _stored_dtypes(file: Path) -> dict[str, str]:
    """Each tensor's dtype as the header has it; nothing of a header that is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            content: Any = json.loads(stream.read(length)) if length <= _LONGEST else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
    return {
        name: entry["dtype"]
        for name, entry in entries.items()
        if isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    }
