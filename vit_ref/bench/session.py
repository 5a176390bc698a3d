"""A whole run: which workloads, with what stands in for what was not said, and each of them timed."""

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
    """Every combination of what was asked for; of what was not, what suits the device.

    On a CPU Ti/16 on 8 images in float32: two cores take a second for it. On an accelerator B/16 on 128 images, which
    fill it, and bfloat16 too, which is what it is for.

    Raises:
      InputError: see `workload`.
    """
    cpu = jax.default_backend() == "cpu"
    sizes = sizes or (["Ti/16"] if cpu else ["B/16"])
    batches = batches or ([8] if cpu else [128])
    precisions = precisions or (["float32"] if cpu else ["float32", "mixed"])
    return [parse_workload(*each) for each in dict.fromkeys(product(sizes, batches, precisions, passes or PASSES))]


def list_implementations(names: Sequence[str]) -> list[str]:
    """Those asked for, or all whose packages and whose device are here.

    Raises:
      InputError: there is none of that name, or its packages or its device are missing.
    """
    for name in names:
        if name not in CONTENDERS:
            raise InputError(f"implementation is {name!r}: give one of {', '.join(CONTENDERS)}")
        CONTENDERS[name].require()
    return list(dict.fromkeys(names)) or [name for name, entry in CONTENDERS.items() if entry.installed()]


def select_able(asked: Workload, names: Sequence[str]) -> list[str]:
    """Those of these implementations that can do a workload."""
    return [name for name in names if not CONTENDERS[name].refusal(asked)]


def time_workloads(
    sizes: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    passes: Sequence[str],
    names: Sequence[str],
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[list[Timing]]:
    """Times each workload when it is asked for.

    Args:
      sizes: see `list_workloads`.
      batches: likewise.
      precisions: likewise.
      passes: likewise.
      names: see `list_implementations`.
      rounds: of each.
      say: told what is out of the ordinary.

    Raises:
      InputError: see `list_workloads` and `list_implementations`.
    """
    todo, racing = list_workloads(sizes, batches, precisions, passes), list_implementations(names)
    if not any(select_able(asked, racing) for asked in todo):
        raise InputError(CONTENDERS[racing[0]].refusal(todo[0]))
    for precision in dict.fromkeys(asked.precision for asked in todo):
        for note in notes(PRECISIONS[precision]):
            say(f"{precision}: {note}")
    done = set()
    for asked in todo:
        entered = select_able(asked, racing)
        for name in dict.fromkeys(names):
            if name not in entered:
                say(f"{asked}: {name} is not timed: {CONTENDERS[name].refusal(asked)}")
        if not entered:
            continue
        roofline = Roofline(asked.numerics)  # before the contenders: what fits has to fit beside it
        fitted, contenders = build_fitting(asked, entered, say)
        if fitted not in done:
            done.add(fitted)
            yield race(fitted, contenders, rounds, roofline)
        del contenders, roofline  # The next ones find the device empty.
