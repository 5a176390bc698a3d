"""Timing several implementations of one workload in turns, so that a noisy machine is as noisy for each."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from vit_ref.bench.compiling import Cost
from vit_ref.bench.contenders import CONTENDERS, Contender, is_out_of_memory
from vit_ref.bench.queueing import passes_at_once
from vit_ref.bench.roofline import Roofline
from vit_ref.bench.workload import Workload
from vit_ref.errors import OutOfMemoryError, UnbuildableError


@dataclasses.dataclass(frozen=True)
class Timing:
    """How fast one implementation did one workload.

    Attributes:
      name: the implementation.
      workload: what it did; `batch` is the one that fitted.
      seconds: of a pass in each round, at least two; of the mean one where several are queued.
      passes: how many were, see `passes_at_once`.
      roofline: operations a second of the device's matrix products, timed in turns with it, or before and after.
      cost: of getting it ready.
    """

    name: str
    workload: Workload
    seconds: tuple[float, ...]
    passes: int
    roofline: float
    cost: Cost

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range of the rounds, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def speedup(self, other: Timing) -> float:
        """How many times as fast as another: the median, over the rounds that the two took in turns, of their ratio.

        A machine that is slow for half the rounds may take one's median from that half and the other's from the rest:
        15 % were seen so where each round said 5 %.
        """
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def images_per_second(self) -> float:
        """Images a second in the median round."""
        return self.workload.batch / self.median

    @property
    def utilisation(self) -> float:
        """MFU: operations a second in closed form, relative to the roofline."""
        return self.workload.flops() / self.median / self.roofline

    def facts(self) -> dict[str, float | None]:
        """What follows from the median round, and the cost, under the names that JSON has."""
        return {
            "images/s": self.images_per_second,
            "FLOPs": self.workload.flops(),
            "roofline FLOP/s": self.roofline,
            "MFU": self.utilisation,
            "passes at once": self.passes,
            **self.cost.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        rounds = {"seconds": list(self.seconds), "median_s": self.median}
        return {"implementation": self.name, **self.workload._asdict(), **rounds, **self.facts()}


def build_fitting(
    workload: Workload, names: Sequence[str], say: Callable[[str], None]
) -> tuple[Workload, tuple[Contender, ...]]:
    """The contenders on the largest batch, this one or a half, a quarter, … of it, that fits in memory for all.

    Args:
      workload: what was asked for.
      names: of `CONTENDERS`. One that cannot be built is left out, if there are others.
      say: told when the batch is halved, and which one is left out and why.

    Raises:
      OutOfMemoryError: one image does not fit.
      UnbuildableError: none of them can be built.
    """
    names = list(names)
    while True:
        try:
            with workload.numerics.active():
                contenders = []
                for name in tuple(names):
                    try:
                        contenders.append(CONTENDERS[name].build(workload))
                    except UnbuildableError as error:
                        names.remove(name)
                        if not names:
                            raise
                        say(f"{workload}: {name} is not timed: {error}")
                return workload, tuple(contenders)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if workload.batch == 1:
            raise OutOfMemoryError(f"{workload}: one image does not fit in the device's memory: take a smaller size")
        half = workload._replace(batch=workload.batch // 2)
        say(f"{workload}: out of memory, going on with batch {half.batch}")
        workload = half


def race(workload: Workload, contenders: Sequence[Contender], rounds: int, roofline: Roofline) -> list[Timing]:
    """Times each contender, `passes_at_once` passes of it, and the roofline's products, once a round, in turns.

    Args:
      workload: what they do.
      contenders: compiled and warm.
      rounds: two at least.
      roofline: of the workload's precision.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    times = passes_at_once()
    for _ in range(rounds):
        roofline.measure()
        for contender in contenders:
            start = time.perf_counter()
            contender.run(times)
            seconds[contender.name].append((time.perf_counter() - start) / times)
    reached = roofline.flops()
    return [
        Timing(contender.name, workload, tuple(seconds[contender.name]), times, reached, contender.cost)
        for contender in contenders
    ]
