"""On what a verdict was reached: versions and device, and how that multiplies."""

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
    """Versions of what takes part in a verdict, the device and the precision of its matrix products; `notes` as one."""
    found = {package: _version(package) for package in PACKAGES}
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return {
        "python": platform.python_version(),
        **found,
        "device": f"{jax.default_backend()} ({kinds}, {platform.machine()})",
        "default matmul precision": precision or f"the backend's own: {products()}",
        **({"note": "; ".join(said)} if asked and (said := notes(asked)) else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# Relative RMS error of a product of two random matrices, 256 wide. Operands in float32: 3e-7, all from the sums.
# Rounded to TF32 4e-4, or twice that where the last bits are cut off; to bfloat16 2.3e-3. Each limit lies halfway, and
# the first one leaves room for what is called "high" on a TPU, three products of bfloat16: 1e-5 at most.
_LIMITS = {"float32": 2e-6, "tensorfloat32": 1.3e-3}


def products(multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul) -> str:
    """What float32 products are on this device now, "float32", "tensorfloat32" or "bfloat16": found by making one.

    Asked, and not looked up by the device's name: flags and environment variables of XLA and CUDA change it, too.
    """
    left, right = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(np.float32)
    truth = left.astype(np.float64) @ right
    off = np.asarray(multiply(jnp.asarray(left), jnp.asarray(right)), np.float64) - truth
    relative = float(np.linalg.norm(off) / np.linalg.norm(truth))
    return next((name for name, limit in _LIMITS.items() if relative <= limit), "bfloat16")


# jax's other words. "default" and "bfloat16" are one to it, and mean what the device likes best.
_WORDS = {"highest": "float32", "F32_F32_F32": "float32", "high": "tensorfloat32"}


def notes(precision: Precision) -> tuple[str, ...]:
    """What a person has to know of this device and of jax's settings to read a verdict in this precision."""
    asked = precision.products
    if asked is None:
        return ()
    said = []
    with precision.active():
        here = products()
    if here != asked:
        said.append(f"{asked} products were asked for, and {jax.default_backend()} made {here} ones")
    setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    default = _WORDS.get(setting, setting) if setting not in (None, "default") else products()
    if default not in (asked, here):
        why = f"jax_default_matmul_precision is {setting!r}" if setting else "the device's own choice"
        said.append(
            f"products are in {default} by default ({why}), and this run asks for {asked}: what is to be as exact"
            f" elsewhere needs jax.default_matmul_precision({asked!r})"
        )
    return tuple(said)
