"""What the result of a computation depends on besides its arguments: as text that goes into every key."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

import vit_ref

# scipy computes the oracle's erf, and ml_dtypes rounds.
_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "torch", "numpy", "scipy", "ml_dtypes")
# Beginnings of the environment variables that change numbers, or may.
_VARIABLE = re.compile(
    r"(XLA|JAX|OMP|OPENBLAS|MKL|ONEDNN|DNNL|GOTO|BLIS|KMP|TORCH|ATEN|CUDA|CUBLAS|CUDNN|NVIDIA|ROCM|HIP|TPU|LIBTPU|NPY|TF)_"
)


def digest(*parts: Any) -> str:
    """Returns a digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_arrays(arrays: Mapping[str, NDArray]) -> str:
    """Returns a digest of arrays: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name}\n{array.dtype}\n{array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


@cache
def machine() -> str:
    """Returns a digest of the processor: its name and the instructions that it knows."""
    kept = ("model name", "flags", "Features", "cpu model", "isa")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(kept)})
    return digest(platform.machine(), platform.system(), platform.processor(), known)


@cache
def source() -> str:
    """Returns a digest of this package's source, so that no change of a formula meets old numbers."""
    root = Path(vit_ref.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root)}\n".encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def surroundings() -> dict[str, Any]:
    """Returns versions, the device and every setting that may change numbers, by name."""
    return {
        "versions": {package: _version(package) for package in _PACKAGES},
        "device packages": _device_packages(),
        "python": platform.python_version(),
        "source": source(),
        "machine": machine(),
        # Sums are divided over threads.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "platform": str(jax.devices()[0].client.platform_version),
        # An attribute has the setting of a context, too, such as that of `jax.default_matmul_precision`.
        "jax": {
            name: repr(getattr(jax.config, name, value))
            for name, value in sorted(jax.config.values.items())
            if "cache" not in name
        },
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _VARIABLE.match(name) and "CACHE" not in name
        },
    }


# The directory of an installed package that computes on accelerators, such as nvidia_cudnn_cu12-9.1.0.70.dist-info.
_DEVICE_PACKAGE = re.compile(r"((?:nvidia|jax)[_-][a-z].*|libtpu.*)\.(?:dist|egg)-info")


@cache
def _device_packages() -> list[str]:
    """Returns the names, with their versions, of the packages that compute on accelerators.

    The names of their directories have both. To read the metadata of all installed packages takes half a second.
    """
    found = set()
    for place in sys.path:
        with contextlib.suppress(OSError):
            found |= {match[1] for name in os.listdir(place or ".") if (match := _DEVICE_PACKAGE.fullmatch(name))}
    return sorted(found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
