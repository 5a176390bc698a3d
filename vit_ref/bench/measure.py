"""Timing of several implementations of one workload in turns, so that a noisy machine disturbs each of them equally."""

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
    """Speed of one implementation on one workload.

    Attributes:
      name: name of the implementation.
      workload: the workload, with the batch that fitted in memory.
      seconds: seconds of a pass in each round, at least two rounds. If several passes are queued, it is their mean.
      passes: number of queued passes, see `passes_at_once`.
      roofline: operations a second of the device's matrix products, measured in turns with the implementation.
      cost: cost of the preparation.
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
        """Returns how many times as fast as another it is: the median of the ratios, round by round.

        A ratio of two medians would mislead on a machine that is slow for half of the rounds: each median may come from
        another half.

        Args:
          other: timing of another implementation in the same rounds.
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
        """Returns the figures of the median round, and the cost, under their names in JSON."""
        return {
            "images/s": self.images_per_second,
            "FLOPs": self.workload.flops(),
            "roofline FLOP/s": self.roofline,
            "MFU": self.utilisation,
            "passes at once": self.passes,
            **self.cost.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns all figures, as JSON takes them."""
        rounds = {"seconds": list(self.seconds), "median_s": self.median}
        return {"implementation": self.name, **self.workload._asdict(), **rounds, **self.facts()}


def build_fitting(
    workload: Workload, names: Sequence[str], say: Callable[[str], None]
) -> tuple[Workload, tuple[Contender, ...]]:
    """Prepares the contenders on the largest batch that fits in memory for all of them.

    It tries the given batch, then a half of it, a quarter, and so on.

    Args:
      workload: the workload, with the largest batch to try.
      names: names in `CONTENDERS`. One that cannot be built is left out, if there are others.
      say: called with a line of text for each halved batch and each implementation that is left out.

    Returns:
      The workload with the batch that fits, and the contenders.

    Raises:
      OutOfMemoryError: one image does not fit.
      UnbuildableError: none of the implementations can be built.
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
                        say(f"{workload}: {name} is left out: {error}")
                return workload, tuple(contenders)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if workload.batch == 1:
            raise OutOfMemoryError(f"{workload}: one image does not fit in the device's memory: give a smaller --size")
        half = workload._replace(batch=workload.batch // 2)
        say(f"{workload}: out of memory: trying batch {half.batch}")
        workload = half


def race(workload: Workload, contenders: Sequence[Contender], rounds: int, roofline: Roofline) -> list[Timing]:
    """Times `passes_at_once` passes of each contender, and the roofline's products, once a round, in turns.

    Args:
      workload: the workload.
      contenders: the implementations, compiled and warm.
      rounds: number of rounds, at least two.
      roofline: the roofline of the workload's precision.

    Returns:
      A timing of each contender.
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
