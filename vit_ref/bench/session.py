"""A whole benchmark run: the choice of workloads and implementations, and their timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import jax

from vit_ref.bench.contenders import CONTENDERS
from vit_ref.bench.measure import Timing, build_fitting, race
from vit_ref.bench.roofline import Roofline
from vit_ref.bench.workload import PASSES, PRECISIONS, Workload, parse_workload
from vit_ref.errors import InputError
from vit_ref.verify.environment import notes


def list_workloads(
    sizes: Sequence[str], batches: Sequence[int], precisions: Sequence[str], passes: Sequence[str]
) -> list[Workload]:
    """Lists every combination of the given values. An empty sequence stands for a choice that suits the device.

    On a CPU that choice is Ti/16 on 8 images in float32, which is quick. On an accelerator it is B/16 on 128 images,
    which fill it, in float32 and in mixed precision, which it is made for.

    Args:
      sizes: sizes of the model, such as "B/16".
      batches: numbers of images.
      precisions: keys of `PRECISIONS`.
      passes: "forward" or "train".

    Raises:
      InputError: a value is unknown or out of range.
    """
    cpu = jax.default_backend() == "cpu"
    sizes = sizes or (["Ti/16"] if cpu else ["B/16"])
    batches = batches or ([8] if cpu else [128])
    precisions = precisions or (["float32"] if cpu else ["float32", "mixed"])
    return [parse_workload(*each) for each in dict.fromkeys(product(sizes, batches, precisions, passes or PASSES))]


def list_implementations(names: Sequence[str]) -> list[str]:
    """Lists the named implementations, or all whose packages and device are available.

    Args:
      names: names in `CONTENDERS`, or none.

    Raises:
      InputError: a name is unknown, or the packages or the device of an implementation are missing.
    """
    for name in names:
        if name not in CONTENDERS:
            raise InputError(f"implementation is {name!r}: give one of {', '.join(CONTENDERS)}")
        CONTENDERS[name].require()
    return list(dict.fromkeys(names)) or [name for name, entry in CONTENDERS.items() if entry.installed()]


def select_able(workload: Workload, names: Sequence[str]) -> list[str]:
    """Returns the implementations that can run a workload."""
    return [name for name in names if not CONTENDERS[name].refusal(workload)]


def time_workloads(
    sizes: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    passes: Sequence[str],
    names: Sequence[str],
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[list[Timing]]:
    """Times each workload, and yields its timings before it begins the next.

    Args:
      sizes: sizes of the model, such as "B/16"; none for a choice that suits the device.
      batches: numbers of images; none for a choice that suits the device.
      precisions: keys of `PRECISIONS`; none for a choice that suits the device.
      passes: "forward" or "train"; none for both.
      names: names in `CONTENDERS`; none for all that are available.
      rounds: number of measurements of each implementation.
      say: called with a line of text about anything unusual.

    Yields:
      A timing of each implementation.

    Raises:
      InputError: a value is unknown or out of range, or an implementation is not available.
    """
    workloads, racing = list_workloads(sizes, batches, precisions, passes), list_implementations(names)
    if not any(select_able(workload, racing) for workload in workloads):
        raise InputError(CONTENDERS[racing[0]].refusal(workloads[0]))
    for precision in dict.fromkeys(workload.precision for workload in workloads):
        for note in notes(PRECISIONS[precision]):
            say(f"{precision}: {note}")
    done = set()
    for workload in workloads:
        entered = select_able(workload, racing)
        for name in dict.fromkeys(names):
            if name not in entered:
                say(f"{workload}: {name} is left out: {CONTENDERS[name].refusal(workload)}")
        if not entered:
            continue
        roofline = Roofline(workload.numerics)  # before the contenders, which have to fit beside it
        fitted, contenders = build_fitting(workload, entered, say)
        if fitted not in done:
            done.add(fitted)
            yield race(fitted, contenders, rounds, roofline)
        del contenders, roofline  # so that the next ones find the device empty
