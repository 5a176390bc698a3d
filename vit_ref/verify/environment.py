"""Records the environment of a verdict: versions, the device, and how the device multiplies."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vit_ref.verify.precision import Precision

PACKAGES = ("vit-ref", "jax", "flax", "transformers", "numpy", "torch")


def environment(asked: Precision | None = None) -> dict[str, str]:
    """Returns the versions, the device and the precision of its matrix products, by name.

    Args:
      asked: the tested precision. If it is given, the key "note" holds what `notes` returns.
    """
    versions = {package: _version(package) for package in PACKAGES}
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{jax.default_backend()} ({kinds}, {platform.machine()})",
        "default matmul precision": precision or f"the device's own choice: {products()}",
        **({"note": "; ".join(lines)} if asked and (lines := notes(asked)) else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# Limits of the relative RMS error of a product of two random matrices, 256 wide. Each limit lies halfway between the
# errors of two kinds of operands. The first limit leaves room for "high" on a TPU, which is three products of bfloat16.
_LIMITS = {"float32": 2e-6, "tensorfloat32": 1.3e-3}


def products(multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul) -> str:
    """Returns what float32 products are on this device now: "float32", "tensorfloat32" or "bfloat16".

    It multiplies and measures, because flags and environment variables of XLA and CUDA change the device's default.

    Args:
      multiply: the product to measure.
    """
    left, right = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(np.float32)
    truth = left.astype(np.float64) @ right
    off = np.asarray(multiply(jnp.asarray(left), jnp.asarray(right)), np.float64) - truth
    relative = float(np.linalg.norm(off) / np.linalg.norm(truth))
    return next((name for name, limit in _LIMITS.items() if relative <= limit), "bfloat16")


# Other names that jax has for these. "default" and "bfloat16" mean the same to jax: the device's preference.
_WORDS = {"highest": "float32", "F32_F32_F32": "float32", "high": "tensorfloat32"}


def notes(precision: Precision) -> tuple[str, ...]:
    """Returns what a reader of the verdict must know about this device and jax's settings.

    Args:
      precision: the tested precision.
    """
    asked = precision.products
    if asked is None:
        return ()
    lines = []
    with precision.active():
        here = products()
    if here != asked:
        lines.append(f"this run requires {asked} products, but {jax.default_backend()} computes {here} products")
    setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    default = _WORDS.get(setting, setting) if setting not in (None, "default") else products()
    if default not in (asked, here):
        why = f"jax_default_matmul_precision is {setting!r}" if setting else "the device's own choice"
        lines.append(
            f"products are {default} by default ({why}), and this run uses {asked}: to get the same accuracy in your"
            f" own program, use jax.default_matmul_precision({asked!r})"
        )
    return tuple(lines)
