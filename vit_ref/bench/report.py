"""Timings as a table, and as a plot of throughput by batch and of operations a second against the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vit_ref.bench.measure import Timing
from vit_ref.errors import InputError
from vit_ref.extras import extra
from vit_ref.files import replacing

_COLOURS = {
    "vit_ref": "#0072B2",
    "vit_ref-cudnn": "#56B4E9",
    "FlaxViT": "#D55E00",
    "PyTorch": "#009E73",
    "torch.compile": "#CC79A7",
}
_AGAINST = "FlaxViT"


def table(timings: Sequence[Timing]) -> Table:
    """Makes a table with a row for each implementation. It shows throughput also as a multiple of FlaxViT's.

    Args:
      timings: timings of one workload.
    """
    first = timings[0]
    shown = Table(title=str(first.workload), title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown.add_column("")
    for heading in ("images/s", "IQR", f"x {_AGAINST}", "MFU", "compile s", "cached s", "GiB"):
        shown.add_column(heading, justify="right")
    other = next((timing for timing in timings if timing.name == _AGAINST), None)
    for timing in timings:
        shown.add_row(
            timing.name,
            f"{timing.images_per_second:.4g}",
            f"{100 * timing.spread:.0f} %",
            f"{timing.speedup(other):.2f}" if other else "-",
            f"{100 * timing.utilisation:.0f} %",
            f"{timing.cost.cold_s:.1f}",
            "-" if timing.cost.cached_s is None else f"{timing.cost.cached_s:.1f}",
            "-" if timing.cost.bytes is None else f"{timing.cost.bytes / 2**30:.2f}",
        )
    shown.caption = (
        f"measured matrix products: {first.roofline / 1e9:,.0f} GFLOP/s; x {_AGAINST}: median of the rounds' ratios"
    )
    shown.caption_justify = "left"
    return shown


def plot(path: Path, timings: Sequence[Timing]) -> None:
    """Plots throughput by batch, and operations a second against the roofline, as a PNG file.

    Args:
      path: the file.
      timings: timings of any workloads. Each implementation, size, precision and pass is a line over the batches.

    Raises:
      InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = extra("matplotlib.figure", "a plot of throughput").Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[tuple[str, str], list[Timing]] = {}
    for timing in sorted(timings, key=lambda timing: timing.workload.batch):
        of = timing.workload
        lines.setdefault((timing.name, f"{of.size} {of.precision} {of.what}"), []).append(timing)
    kinds = list(dict.fromkeys(kind for _, kind in lines))
    for (name, kind), along in lines.items():
        style: dict[str, Any] = {
            "color": _COLOURS[name],
            "linestyle": ("-", "--", ":", "-.")[kinds.index(kind) % 4],
            "marker": "o",
            "label": f"{name}, {kind}" if len(kinds) > 1 else name,
        }
        batches = [timing.workload.batch for timing in along]
        left.plot(batches, [timing.images_per_second for timing in along], **style)
        right.plot(batches, [timing.workload.flops() / timing.median / 1e9 for timing in along], **style)
    for precision in dict.fromkeys(timing.workload.precision for timing in timings):
        roofline = max(timing.roofline for timing in timings if timing.workload.precision == precision) / 1e9
        right.axhline(roofline, color="black", linewidth=1)
        right.annotate(
            f"fastest matrix products, {precision}",
            (0, roofline),
            (4, -11),
            ("axes fraction", "data"),
            "offset points",
        )
    for axes, label in ((left, "images/s"), (right, "GFLOP/s")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title(kinds[0] if len(kinds) == 1 else "throughput", loc="left")
    right.set_title("operations a second and the roofline", loc="left")
    left.legend(frameon=False, fontsize="small")
    try:
        with replacing(path) as draft:
            figure.savefig(draft, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"{path}: it cannot be written ({error.strerror}): give another place") from None
