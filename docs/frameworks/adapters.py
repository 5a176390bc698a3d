"""The measured operations in each framework, with the framework's own defaults.

An adapter imports its framework, so that `measure.py` needs no other framework. Each entry takes NumPy arrays and
returns what NumPy can read. An adapter leaves out an operation that its framework lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Operations = dict[str, Any]


def jax_() -> Operations:
    """Returns what jax calls the operations."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    return {
        "version": jax.__version__,
        "gelu": lambda x: jax.nn.gelu(jnp.asarray(x)),
        "gelu_erf": lambda x: jax.nn.gelu(jnp.asarray(x), approximate=False),
        "softmax_bfloat16": _half(jnp.bfloat16, jax.nn.softmax),
        "softmax_float16": _half(jnp.float16, jax.nn.softmax),
        "resize": lambda x, h, w: jax.image.resize(jnp.asarray(x), (h, w), "bicubic"),
        "attention": lambda q, k, v: jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v))),
    }


def flax_nnx() -> Operations:
    """Returns what flax.nnx calls the operations."""
    import flax
    import jax
    import jax.numpy as jnp
    from flax import nnx

    jax.config.update("jax_enable_x64", True)
    norm = nnx.LayerNorm(256, rngs=nnx.Rngs(0))
    linear = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    return {
        "version": flax.__version__,
        "gelu": lambda x: nnx.gelu(jnp.asarray(x)),
        "layer_norm": lambda x: norm(jnp.asarray(x)),
        "epsilon": norm.epsilon,
        "linear": (linear.kernel.shape, linear.bias is not None),
        "attention": lambda q, k, v: nnx.dot_product_attention(*map(jnp.asarray, (q, k, v))),
    }


def equinox() -> Operations:
    """Returns what equinox calls the operations."""
    import equinox
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    norm = equinox.nn.LayerNorm(256, dtype=jnp.float32)
    linear = equinox.nn.Linear(3, 5, key=jax.random.key(0))
    return {
        "version": equinox.__version__,
        "layer_norm": lambda x: jax.vmap(norm)(jnp.asarray(x)),
        "epsilon": norm.eps,
        "linear": (linear.weight.shape, linear.bias is not None),
    }


def haiku() -> Operations:
    """Returns what dm-haiku calls the operations."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    made = hk.without_apply_rng(hk.transform(lambda x: hk.LayerNorm(-1, True, True)(x)))
    linear = hk.transform(lambda x: hk.Linear(5)(x)).init(jax.random.key(0), jnp.ones((1, 3)))["linear"]
    return {
        "version": hk.__version__,
        "layer_norm": lambda x: made.apply(made.init(None, jnp.asarray(x)), jnp.asarray(x)),
        "epsilon": hk.LayerNorm.__init__.__defaults__[0],
        "linear": (linear["w"].shape, "b" in linear),
    }


def penzai() -> Operations:
    """Returns what penzai calls the operations."""
    import importlib.metadata
    import inspect

    import jax
    import jax.numpy as jnp
    from penzai import pz

    norm = pz.nn.LayerNorm.from_config("norm", jax.random.key(0), {"d": 256})
    epsilon = inspect.signature(pz.nn.LayerNorm.from_config).parameters["epsilon"].default
    return {
        "version": importlib.metadata.version("penzai"),
        "layer_norm": lambda x: norm(pz.nx.wrap(jnp.asarray(x)).tag("n", "d")).untag("n", "d").unwrap(),
        "epsilon": epsilon,
        "linear": ("named axes", False),
    }


def keras_on_jax() -> Operations:
    """Returns what Keras 3 on jax calls the operations."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    jax.config.update("jax_enable_x64", True)
    norm = keras.layers.LayerNormalization()
    dense = keras.layers.Dense(5)
    dense.build((None, 3))
    return {
        "version": keras.__version__,
        "gelu": keras.activations.gelu,
        "gelu_erf": lambda x: keras.activations.gelu(x, approximate=False),
        "layer_norm": norm,
        "epsilon": norm.epsilon,
        "softmax_bfloat16": _half("bfloat16", keras.ops.softmax, keras.ops.cast),
        "softmax_float16": _half("float16", keras.ops.softmax, keras.ops.cast),
        "resize": lambda x, h, w: keras.ops.image.resize(x[..., None], (h, w), interpolation="bicubic")[..., 0],
        "linear": (tuple(dense.kernel.shape), dense.use_bias),
        "attention": lambda q, k, v: keras.ops.dot_product_attention(q, k, v),
    }


def torch_eager() -> Operations:
    """Returns what PyTorch, operation by operation, calls the operations."""
    return _torch(lambda function: function)


def torch_compiled() -> Operations:
    """Returns what PyTorch compiled by inductor calls the operations."""
    import torch

    return _torch(torch.compile)


def _torch(wrap: Callable[..., Any]) -> Operations:
    import torch
    from torch.nn import functional

    norm = torch.nn.LayerNorm(256)
    linear = torch.nn.Linear(3, 5)

    def on_arrays(function: Callable[..., Any]) -> Callable[..., Array]:
        wrapped = wrap(function)

        def run(*arrays: Array) -> Array:
            with torch.no_grad():
                return np.asarray(wrapped(*map(torch.from_numpy, arrays)))

        return run

    def softmax_of(dtype: torch.dtype) -> Callable[..., Array]:
        return on_arrays(lambda x: functional.softmax(x.to(dtype), -1).double())

    def resize(x: Array, height: int, width: int) -> Array:
        size = (height, width)
        return on_arrays(lambda x: functional.interpolate(x[None, None], size, mode="bicubic")[0, 0])(x)

    def attention(query: Array, key: Array, value: Array) -> Array:
        function = functional.scaled_dot_product_attention
        run = on_arrays(lambda *heads: function(*(each.transpose(1, 2) for each in heads)).transpose(1, 2))
        return run(query, key, value)

    return {
        "version": torch.__version__.split("+")[0],
        "gelu": on_arrays(lambda x: functional.gelu(x)),
        "gelu_erf": on_arrays(lambda x: functional.gelu(x)),
        "layer_norm": on_arrays(norm),
        "epsilon": norm.eps,
        "softmax_bfloat16": softmax_of(torch.bfloat16),
        "softmax_float16": softmax_of(torch.float16),
        "resize": resize,
        "linear": (tuple(linear.weight.shape), linear.bias is not None),
        "attention": attention,
    }


def onnxruntime() -> Operations:
    """Returns what ONNX Runtime calls the operations."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    kinds = {
        np.dtype(np.float32): TensorProto.FLOAT,
        np.dtype(np.float64): TensorProto.DOUBLE,
        np.dtype(np.float16): TensorProto.FLOAT16,
    }

    def run(
        operator: str, *arrays: Array, opset: int = 21, constants: tuple[Any, ...] = (), **attributes: Any
    ) -> Array:
        """Runs one operator; `constants` are its further inputs, None for one that is left out."""
        names = [f"x{index}" for index in range(len(arrays))]
        inputs = [
            helper.make_tensor_value_info(name, kinds[array.dtype], array.shape)
            for name, array in zip(names, arrays, strict=True)
        ]
        extra = ["" if constant is None else f"c{index}" for index, constant in enumerate(constants)]
        initial = [
            numpy_helper.from_array(constant, name) for constant, name in zip(constants, extra, strict=True) if name
        ]
        node = helper.make_node(operator, names + extra, ["y"], **attributes)
        output = helper.make_tensor_value_info("y", kinds[arrays[0].dtype], None)
        model = helper.make_model(
            helper.make_graph([node], "one", inputs, [output], initial), opset_imports=[helper.make_opsetid("", opset)]
        )
        model.ir_version = 10
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    def resize(x: Array, height: int, width: int) -> Array:
        sizes = np.array([1, 1, height, width], np.int64)
        return run("Resize", x[None, None].astype(np.float32), constants=(None, None, sizes), mode="cubic")[0, 0]

    def attention(*heads: Array) -> Array:
        """Takes (batch, tokens, heads, width); the operator wants heads before tokens."""
        return run("Attention", *(each.transpose(0, 2, 1, 3).copy() for each in heads), opset=23).transpose(0, 2, 1, 3)

    norm = onnx.defs.get_schema("LayerNormalization").attributes["epsilon"].default_value.f
    ones = np.ones(256, np.float32)
    return {
        "version": ort.__version__,
        "gelu": lambda x: run("Gelu", x),
        "gelu_erf": lambda x: run("Gelu", x),
        "layer_norm": lambda x: run("LayerNormalization", x, ones, opset=17),
        "epsilon": float(norm),
        "softmax_float16": lambda x: run("Softmax", x.astype(np.float16)),
        "resize": resize,
        "linear": ("(in, out), unless Gemm has transB", None),
        "attention": attention,
    }  # fmt: skip


def openvino() -> Operations:
    """Returns what OpenVINO calls the operations."""
    import openvino as ov
    from openvino import opset15 as ops

    def run(build: Callable[..., Any], *arrays: Array) -> Array:
        parameters = [ops.parameter(array.shape, array.dtype) for array in arrays]
        model = ov.Model([build(*parameters)], parameters)
        compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.asarray(compiled(list(arrays))[0])

    def resize(x: Array, height: int, width: int) -> Array:
        size = np.array([height, width], np.int64)

        def build(p: Any) -> Any:
            return ops.interpolate(p, size, "cubic", "sizes", axes=np.array([2, 3], np.int64))

        return run(build, x[None, None].astype(np.float32))[0, 0]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ops.scaled_dot_product_attention(q, k, v)

    def attention(*heads: Array) -> Array:
        return run(attend, *(each.transpose(0, 2, 1, 3).copy() for each in heads)).transpose(0, 2, 1, 3)

    return {
        "version": ov.__version__.split("-")[0],
        "gelu": lambda x: run(lambda p: ops.gelu(p, "erf"), x),
        "gelu_erf": lambda x: run(lambda p: ops.gelu(p, "erf"), x),
        "layer_norm": lambda x: run(lambda p: ops.mvn(p, np.array([-1]), True, 1e-5, "inside_sqrt"), x),
        "epsilon": None,
        "softmax_float16": lambda x: run(lambda p: ops.softmax(p, -1), x.astype(np.float16)),
        "resize": resize,
        "attention": attention,
    }


def mlx() -> Operations:
    """Returns what MLX on a CPU calls the operations."""
    import importlib.metadata

    import mlx.core as mx
    import mlx.nn as nn

    mx.set_default_device(mx.cpu)
    norm = nn.LayerNorm(256)
    linear = nn.Linear(3, 5)

    def resize(x: Array, height: int, width: int) -> Array:
        scale = (height / x.shape[0], width / x.shape[1])
        return np.asarray(nn.Upsample(scale, "cubic")(mx.array(x[None, :, :, None].astype(np.float32))))[0, :, :, 0]

    def attention(query: Array, key: Array, value: Array) -> Array:
        heads = (mx.array(each.transpose(0, 2, 1, 3), dtype=mx.float64) for each in (query, key, value))
        result = mx.fast.scaled_dot_product_attention(*heads, scale=query.shape[-1] ** -0.5)
        return np.asarray(result).transpose(0, 2, 1, 3)

    return {
        "version": importlib.metadata.version("mlx"),
        "gelu": lambda x: nn.gelu(mx.array(x)),
        "gelu_erf": lambda x: nn.gelu(mx.array(x)),
        "layer_norm": lambda x: norm(mx.array(x)),
        "epsilon": norm.eps,
        "softmax_bfloat16": lambda x: mx.softmax(mx.array(x).astype(mx.bfloat16), -1).astype(mx.float32),
        "softmax_float16": lambda x: mx.softmax(mx.array(x).astype(mx.float16), -1).astype(mx.float32),
        "resize": resize,
        "linear": (tuple(linear.weight.shape), "bias" in linear),
        "attention": attention,
    }


def paddle() -> Operations:
    """Returns what PaddlePaddle calls the operations."""
    import paddle
    from paddle.nn import functional

    norm = paddle.nn.LayerNorm(256)
    linear = paddle.nn.Linear(3, 5)

    def resize(x: Array, height: int, width: int) -> Array:
        return functional.interpolate(paddle.to_tensor(x[None, None]), (height, width), mode="bicubic").numpy()[0, 0]

    def attention(*heads: Array) -> Array:
        return functional.scaled_dot_product_attention(*map(paddle.to_tensor, heads)).numpy()

    return {
        "version": paddle.__version__,
        "gelu": lambda x: functional.gelu(paddle.to_tensor(x)).numpy(),
        "gelu_erf": lambda x: functional.gelu(paddle.to_tensor(x)).numpy(),
        "layer_norm": lambda x: norm(paddle.to_tensor(x)).numpy(),
        "epsilon": norm._epsilon,
        "softmax_bfloat16": _half("bfloat16", functional.softmax, lambda x, d: paddle.to_tensor(x).astype(d)),
        "softmax_float16": _half("float16", functional.softmax, lambda x, d: paddle.to_tensor(x).astype(d)),
        "resize": resize,
        "linear": (tuple(linear.weight.shape), linear.bias is not None),
        "attention": attention,
    }


def tinygrad() -> Operations:
    """Returns what tinygrad calls the operations."""
    import importlib.metadata

    from tinygrad import Tensor, dtypes, nn

    norm = nn.LayerNorm(256)
    linear = nn.Linear(3, 5)

    def attention(*heads: Array) -> Array:
        query, key, value = (Tensor(each.transpose(0, 2, 1, 3).copy()) for each in heads)
        return query.scaled_dot_product_attention(key, value).numpy().transpose(0, 2, 1, 3)

    return {
        "version": importlib.metadata.version("tinygrad"),
        "gelu": lambda x: Tensor(x).gelu().numpy(),
        "layer_norm": lambda x: norm(Tensor(x)).numpy(),
        "epsilon": norm.eps,
        "softmax_float16": lambda x: Tensor(x).cast(dtypes.float16).softmax(-1).float().numpy(),
        "linear": (tuple(linear.weight.shape), linear.bias is not None),
        "attention": attention,
    }


def mindspore() -> Operations:
    """Returns what MindSpore calls the operations."""
    import mindspore as ms

    norm = ms.nn.LayerNorm([256])
    dense = ms.nn.Dense(3, 5)

    def resize(x: Array, height: int, width: int) -> Array:
        image = ms.Tensor(x[None, None].astype(np.float32))
        return ms.ops.interpolate(image, size=(height, width), mode="bicubic").asnumpy()[0, 0]

    return {
        "version": ms.__version__,
        "gelu": lambda x: ms.ops.gelu(ms.Tensor(x)).asnumpy(),
        "gelu_erf": lambda x: ms.ops.gelu(ms.Tensor(x), approximate="none").asnumpy(),
        "layer_norm": lambda x: norm(ms.Tensor(x)).asnumpy(),
        "epsilon": norm.epsilon,
        "softmax_float16": lambda x: ms.ops.softmax(ms.Tensor(x.astype(np.float16)), -1).asnumpy(),
        "resize": resize,
        "linear": (tuple(dense.weight.shape), dense.has_bias),
    }


def _half(dtype: Any, softmax: Callable[..., Any], cast: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Returns a softmax that takes float32 values, rounds them to `dtype` and gives the result in float32."""
    if cast is None:
        return lambda x: softmax(np.asarray(x).astype(dtype)).astype(np.float32)
    return lambda x: cast(softmax(cast(x, dtype)), "float32")
