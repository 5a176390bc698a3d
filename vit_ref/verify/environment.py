"""On what a verdict was reached: versions and device."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

PACKAGES = ("vit-ref", "jax", "flax", "transformers", "numpy", "torch")


def environment() -> dict[str, str]:
    """Versions of what takes part in a verdict, the device, and the precision of its matrix products."""
    found = {package: _version(package) for package in PACKAGES}
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return {
        "python": platform.python_version(),
        **found,
        "device": f"{jax.default_backend()} ({kinds}, {platform.machine()})",
        "default matmul precision": precision or "the backend's own",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
