"""Records the environment of a verdict: versions, the device, and how the device multiplies."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_ref.verify.gates import error
from vit_ref.verify.precision import Precision

PACKAGES = ("vit-ref", "jax", "flax", "transformers", "numpy", "torch")


def environment(asked: Precision | None = None) -> dict[str, str]:
    """Returns the versions, the device and the precision of its matrix products, by name.

    Args:
      asked: the tested precision. If it is given, the key "products" holds what `describe_products` returns, and the
        key "note" what `notes` returns.
    """
    versions = {package: _version(package) for package in PACKAGES}
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    setting = _setting() or "the device's own choice"
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{jax.default_backend()} ({kinds}, {platform.machine()})",
        "default matmul precision": f"{setting}: {_measure_products()}",
        **({"products": describe_products(asked)} if asked else {}),
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
# A product of bfloat16 or float16 that is summed in float32 errs as much as one rounding. If each of the 256 sums is
# rounded, it errs eleven times as much.
_SUMMED_WIDE = 3.3


def products(multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul, dtype: DTypeLike = np.float32) -> str:
    """Returns what products of this dtype are on this device now.

    It multiplies and measures, because flags and environment variables of XLA and CUDA change the device's default.
    A setting proves nothing: a CPU accepts "BF16_BF16_F32" and multiplies float32 as it is.

    Args:
      multiply: the product to measure.
      dtype: float32, bfloat16 or float16.

    Returns:
      "float32", "tensorfloat32" or "bfloat16" for products of float32. For the others it names the dtype of the sums,
      too: "bfloat16, summed in float32".
    """
    left, right = np.random.default_rng(0).normal(size=(2, 256, 256)).astype(dtype)
    truth = left.astype(np.float64) @ right.astype(np.float64)
    relative = error(np.asarray(multiply(jnp.asarray(left), jnp.asarray(right))), truth).rms
    if left.dtype == np.float32:
        return next((name for name, limit in _LIMITS.items() if relative <= limit), "bfloat16")
    wide = relative <= _SUMMED_WIDE * error(truth.astype(dtype), truth).rms
    return f"{left.dtype.name}, summed in {'float32' if wide else left.dtype.name}"


def describe_products(precision: Precision) -> str:
    """Returns what products are in a run of this precision, and what the run asked for if that is something else.

    Args:
      precision: the tested precision.
    """
    with precision.active():
        here = _measure_products(precision.dtype)
    if precision.products in (None, here):
        return here
    backend = jax.default_backend()
    why = "rounds nothing" if here == "float32" else "rounds in another way"
    return f"{here} (asked {precision.products}: this {backend} {why})"


def notes(precision: Precision) -> tuple[str, ...]:
    """Returns what a reader of the verdict must know about this device and jax's settings.

    Args:
      precision: the tested precision.
    """
    asked = precision.products
    if asked is None:
        return ()
    described = describe_products(precision)
    lines = [f"products are {described}"] if described != asked else []
    default, setting = _measure_products(), _setting()
    if default not in (asked, described.partition(" ")[0]):
        why = f"jax_default_matmul_precision is {setting!r}" if setting else "the device's own choice"
        lines.append(
            f"products are {default} by default ({why}), and this run uses {asked}: to get the same accuracy in your"
            f" own program, use jax.default_matmul_precision({asked!r})"
        )
    return tuple(lines)


def _setting() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def _measure_products(dtype: DTypeLike = np.float32) -> str:
    try:
        return products(dtype=dtype)
    # jax has names that some devices refuse: "TF32_TF32_F32" on a CPU. The exception depends on the device.
    except (ValueError, RuntimeError):
        return f"refused by this {jax.default_backend()}"
