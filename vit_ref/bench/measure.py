"""Timing several implementations of one workload in turns, so that a noisy machine is as noisy for each."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from vit_ref.bench.contenders import CONTENDERS, Contender
from vit_ref.bench.workload import Workload
from vit_ref.errors import InputError

# What the allocators of XLA and PyTorch say.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory")


class OutOfMemoryError(InputError):
    """Not even one image fits."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast one implementation did one workload.

    Attributes:
      name: the implementation.
      workload: what it did; `batch` is the one that fitted.
      seconds: of each round, at least two.
      roofline: operations a second of the device's matrix products, in the same run.
      cold_s: seconds to compile with nothing cached, or until the first result.
      cached_s: seconds to compile from the persistent cache; None where XLA did not.
      xla_flops: operations as XLA counts them, elementwise ones too; None likewise.
      bytes: of device memory at its peak, by XLA's plan; None likewise.
    """

    name: str
    workload: Workload
    seconds: tuple[float, ...]
    roofline: float
    cold_s: float
    cached_s: float | None
    xla_flops: float | None
    bytes: int | None

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range of the rounds, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    @property
    def images_per_second(self) -> float:
        """Images a second in the median round."""
        return self.workload.batch / self.median

    @property
    def utilisation(self) -> float:
        """MFU: operations a second in closed form, relative to the roofline."""
        return self.workload.flops() / self.median / self.roofline

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "implementation": self.name,
            **self.workload._asdict(),
            "seconds": list(self.seconds),
            "median_s": self.median,
            **facts(self.workload, self.median, self.roofline),
            **compilation(self.cold_s, self.cached_s, self.xla_flops, self.bytes),
        }


def facts(workload: Workload, seconds: float, roofline: float) -> dict[str, float]:
    """What follows from the time of one round."""
    return {
        "images/s": workload.batch / seconds,
        "FLOPs": workload.flops(),
        "roofline FLOP/s": roofline,
        "MFU": workload.flops() / seconds / roofline,
    }


def compilation(
    cold_s: float, cached_s: float | None, xla_flops: float | None, held: int | None
) -> dict[str, float | None]:
    """What compiling cost and found, under the names that JSON has."""
    return {"compile cold s": cold_s, "compile cached s": cached_s, "XLA's FLOPs": xla_flops, "peak bytes": held}


def fitting(
    workload: Workload, names: Sequence[str], say: Callable[[str], None]
) -> tuple[Workload, tuple[Contender, ...]]:
    """The contenders on the largest batch, this one or a half, a quarter, … of it, that fits in memory for all.

    Args:
      workload: what was asked for.
      names: of `CONTENDERS`.
      say: told when the batch is halved.

    Raises:
      OutOfMemoryError: one image does not fit.
    """
    while True:
        try:
            with workload.asked():
                return workload, tuple(CONTENDERS[name](workload) for name in names)
        except Exception as error:
            if not any(sign in str(error) for sign in _NO_MEMORY):
                raise
        if workload.batch == 1:
            raise OutOfMemoryError(f"{workload}: one image does not fit in the device's memory: take a smaller size")
        half = workload._replace(batch=workload.batch // 2)
        say(f"{workload}: out of memory, going on with batch {half.batch}")
        workload = half


def race(workload: Workload, contenders: Sequence[Contender], rounds: int, roofline: float) -> list[Timing]:
    """Times each contender once a round, in turns.

    Args:
      workload: what they do.
      contenders: compiled and warm.
      rounds: two at least.
      roofline: see `Timing`.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            seconds[contender.name].append(time.perf_counter() - start)
    timings = []
    for contender in contenders:
        compiled = contender.compiled
        timings.append(
            Timing(
                contender.name,
                workload,
                tuple(seconds[contender.name]),
                roofline,
                compiled.cold_s if compiled else contender.cold_s or 0.0,
                compiled.cached_s if compiled else None,
                compiled.flops if compiled else None,
                compiled.bytes if compiled else None,
            )
        )
    return timings
