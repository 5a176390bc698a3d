"""Check of the dtypes in a safetensors header, before the library reads the tensors.

NumPy has no array for some dtypes. The library then raises an error of NumPy's, or calls the file damaged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vit_ref.errors import CheckpointError

# Names in the header (https://huggingface.co/docs/safetensors). NumPy reads BF16 with ml_dtypes.
READABLE = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"})
# The library refuses a longer header.
_LONGEST = 100_000_000


def require_readable(file: Path) -> None:
    """Checks that this package can read the dtypes of all tensors in a safetensors file.

    It ignores a damaged header, because the library reports that when it reads the file.

    Raises:
      CheckpointError: a tensor has another dtype.
    """
    stored = _stored_dtypes(file)
    strange = {name: dtype for name, dtype in stored.items() if dtype not in READABLE}
    if not strange:
        return
    name, dtype = next(iter(strange.items()))
    others = f" (and so are others: {len(strange)} of {len(stored)} tensors)" if len(strange) > 1 else ""
    raise CheckpointError(
        f"{file}: {name} is stored as {dtype}{others}, {_meaning(dtype)}: save the weights as float32 or bfloat16 with"
        " the library that quantised them, or give the checkpoint from before that"
    )


def _meaning(dtype: str) -> str:
    kind = {"F8": "float8", "F6": "float6", "F4": "float4"}.get(dtype.partition("_")[0])
    return f"which is {kind}" if kind else "which vit_ref does not know"


def _stored_dtypes(file: Path) -> dict[str, str]:
    """Returns each tensor's dtype from the header, or nothing if the header is damaged."""
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
