"""transformers' ViT in PyTorch with its fused attention as a contender, on PyTorch's GPU if there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers

from vit_ref.bench.contenders import is_out_of_memory
from vit_ref.bench.queueing import queue_passes
from vit_ref.bench.workload import Workload
from vit_ref.errors import UnbuildableError


def build(workload: Workload, rate: float, *, compiles: bool) -> tuple[Callable[..., Any], float]:
    """Prepares a pass as a function from `queue_passes`, and warms it up.

    Args:
      workload: the workload.
      rate: learning rate of AdamW.
      compiles: whether to use `torch.compile`.

    Returns:
      The function, and the seconds of its first call.

    Raises:
      UnbuildableError: `torch.compile` does not work here, for example without a C++ compiler.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if workload.precision == "tensorfloat32" else "highest")
    half = {"mixed": torch.bfloat16, "float16": torch.float16}.get(workload.precision)
    config = transformers.ViTConfig(**workload.config.hf_numerics())
    model: Any = transformers.ViTForImageClassification(config)
    model.to(device)
    model.train(workload.what != "forward")
    pixels, labels = (torch.from_numpy(array).to(device) for array in workload.inputs())
    # PyTorch needs channels first, and class ids in 64 bits.
    pixels, labels = pixels.permute(0, 3, 1, 2).contiguous(), labels.long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4, fused=device.type == "cuda")
    called = model
    if compiles:
        with _compiling():
            called = torch.compile(model)

    def logits() -> Any:
        with torch.autocast(device.type, half, enabled=half is not None):
            return called(pixels).logits

    def launch() -> Any:
        if workload.what == "forward":
            with torch.inference_mode():
                return logits()
        loss = torch.nn.functional.cross_entropy(logits().float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def wait(result: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    run = queue_passes(launch, wait)

    start = time.perf_counter()
    with _compiling() if compiles else nullcontext():
        run()
    first = time.perf_counter() - start
    run()
    return run, first


@contextmanager
def _compiling() -> Iterator[None]:
    """Makes one line of an error of `torch.compile`. It leaves out-of-memory errors to the caller, who can react."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UnbuildableError(
            f"torch.compile failed ({str(error).strip().splitlines()[0]}): install what it needs, usually a C++"
            " compiler, or choose others with --implementation"
        ) from error
