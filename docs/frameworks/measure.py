"""Measures one framework, in whose environment this runs, and prints JSON: `python measure.py ADAPTER`."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import adapters
import numpy as np
import truth

POINTS = (-3.0, -5.0, -8.0)
MEANS = (0.0, 1e2, 1e3, 1e4)


def measure(operations: dict[str, Any]) -> dict[str, Any]:
    """Returns every figure of the page for one framework, None for an operation that the framework lacks."""
    figures: dict[str, Any] = {"version": operations["version"], "python": platform.python_version()}
    for name, question in QUESTIONS.items():
        try:
            figures[name] = question(operations)
        except KeyError as error:
            if error.args[0] in operations:
                raise
            figures[name] = None
        except Exception as error:  # a framework refuses in its own way, and that is what the page says
            figures[name] = {"refused": f"{type(error).__name__}"}
            print(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}", file=sys.stderr)
    return figures


def gelu_default(operations: dict[str, Any]) -> str:
    """Says which form the framework takes when the caller names none."""
    x = np.linspace(-3, 3, 61, dtype=np.float32)
    value = np.asarray(operations["gelu"](x))
    errors = {
        "erf": truth.relative_rms(value, truth.gelu_erf(x)),
        "tanh": truth.relative_rms(value, truth.gelu_tanh(x)),
    }
    return min(errors, key=lambda form: errors[form])


def gelu_errors(operations: dict[str, Any]) -> list[float]:
    """Measures relative errors of the erf form in float32, at `POINTS`. The array is long, so that vector code runs."""
    x = np.repeat(np.array(POINTS, np.float32), 64)
    value = np.asarray(operations["gelu_erf"](x), np.float64).reshape(len(POINTS), -1)[:, 0]
    expected = truth.gelu_erf(np.array(POINTS))
    return [float(error) for error in abs(value / expected - 1)]


def norm_errors(operations: dict[str, Any]) -> list[float]:
    """Measures relative RMS errors of rows of 256 numbers of deviation 1 and of each of `MEANS`, in float32.

    The truth is the norm of the same float32 numbers with the same epsilon, so that rounding the input is no error.
    """
    norm = operations["layer_norm"]
    epsilon = 1e-5 if operations["epsilon"] is None else operations["epsilon"]
    draws = np.random.default_rng(0).standard_normal((64, 256))
    errors = []
    for mean in MEANS:
        x = (draws + mean).astype(np.float32)
        errors.append(truth.relative_rms(np.asarray(norm(x)), truth.layer_norm(x.astype(np.float64), epsilon)))
    return errors


def softmax_error(dtype: str, bits: int) -> Callable[[dict[str, Any]], float]:
    """Returns the question for one dtype, whose unit of rounding is 2**-bits."""

    def ask(operations: dict[str, Any]) -> float:
        x = np.random.default_rng(0).standard_normal((64, 257)).astype(np.float32) * 4
        # Values that the dtype holds, so that rounding the input is no error.
        x = x.astype(np.float16).astype(np.float32) if dtype == "float16" else _to_bfloat16(x)
        value = np.asarray(operations[f"softmax_{dtype}"](x)).astype(np.float64)
        expected = truth.softmax(x.astype(np.float64))
        normal = expected > 1e-4  # float16 has no full digits below
        return float(np.sqrt(np.mean((value[normal] / expected[normal] - 1) ** 2)) * 2.0**bits)

    return ask


def _to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


def resize_larger(operations: dict[str, Any]) -> dict[str, Any]:
    """Describes the resize of an image to twice its size."""
    return _resize(operations, 7, 9, 14, 18)


def resize_smaller(operations: dict[str, Any]) -> dict[str, Any]:
    """Describes the resize of an image to half its size."""
    return _resize(operations, 14, 18, 7, 9)


def _resize(operations: dict[str, Any], height: int, width: int, new_height: int, new_width: int) -> dict[str, Any]:
    image = np.random.default_rng(0).standard_normal((height, width)).astype(np.float32)
    return truth.describe_resize(operations["resize"], image, new_height, new_width)


def attention_error(operations: dict[str, Any]) -> float:
    """Measures the relative RMS error of fused attention on float64 inputs."""
    draw = np.random.default_rng(0)
    heads = [draw.standard_normal((2, 37, 3, 16)) for _ in range(3)]
    return truth.relative_rms(np.asarray(operations["attention"](*heads)), truth.attention(*heads))


QUESTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gelu_default": gelu_default,
    "gelu_errors": gelu_errors,
    "epsilon": lambda operations: operations["epsilon"],
    "norm_errors": norm_errors,
    "softmax_bfloat16": softmax_error("bfloat16", 8),
    "softmax_float16": softmax_error("float16", 11),
    "resize_larger": resize_larger,
    "resize_smaller": resize_smaller,
    "linear": lambda operations: operations["linear"],
    "attention": attention_error,
}

if __name__ == "__main__":
    print(json.dumps(measure(getattr(adapters, sys.argv[1])())))
