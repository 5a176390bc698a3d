"""Does the benchmark time what its options say, and are its figures those of the rounds?"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_ref.bench import contenders, measure, queueing, roofline, session
from vit_ref.bench.compiling import Cost, compile_twice
from vit_ref.bench.contenders import Contender, Entry
from vit_ref.bench.measure import Timing, build_fitting, race
from vit_ref.bench.report import table
from vit_ref.bench.roofline import Roofline
from vit_ref.bench.session import list_implementations, list_workloads
from vit_ref.bench.workload import Workload
from vit_ref.errors import InputError, OutOfMemoryError
from vit_ref.model import attention
from vit_ref.model.attention import cudnn

FUSED = "vit_ref-cudnn"
DAY = 86400.0
WORK = Workload("Ti/16", 8, "float32", "forward")


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[[int], Any] = lambda side: None) -> None:
    """Replaces the products by some that are not computed."""
    monkeypatch.setattr(roofline, "_product", lambda side, dtype: lambda times=1: [run(side) for _ in range(times)])


def _timing(seconds: tuple[float, ...]) -> Timing:
    return Timing("vit_ref", WORK, seconds, 1, 1e12, Cost(3.0, 1.0, 2.1e10, 2**30))


def test_figures_follow_from_the_median_round() -> None:
    timing = _timing((0.5, 0.1, 0.2, 0.3, 0.9))
    assert timing.images_per_second == 8 / 0.3
    assert timing.utilisation == WORK.flops() / 0.3 / 1e12
    # Quartiles of five ordered values, exclusive: halfway between the first two, and the last two.
    assert timing.spread == pytest.approx(((0.5 + 0.9) / 2 - (0.1 + 0.2) / 2) / 0.3)


def test_implementations_are_compared_round_by_round() -> None:
    # One contender is slow from the fourth round on, the other from the third: medians would give 1.47.
    mine, theirs = _timing((3.0, 3.0, 3.0, 4.2, 4.2)), _timing((3.15, 3.15, 4.41, 4.41, 4.41))
    assert mine.speedup(theirs) == pytest.approx(1.05)
    assert theirs.speedup(mine) == pytest.approx(1 / 1.05)
    columns = table([mine, dataclasses.replace(theirs, name="FlaxViT")]).columns
    assert [list(column.cells) for column in columns if column.header == "x FlaxViT"] == [["1.05", "1.00"]]


def test_contenders_and_products_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    stand_in(monkeypatch, lambda side: order.append(str(side)))

    def runner(name: str, seconds: float) -> Contender:
        def run(times: int) -> None:
            order.extend([name] * times)
            time.sleep(seconds * times)

        return Contender(name, run, Cost(7.0))

    def timed() -> list[Timing]:
        order.clear()
        return race(WORK, [runner("slow", 0.02), runner("quick", 0.0)], 3, Roofline(WORK.numerics))

    slow, quick = timed()
    assert order == ["1024", "1024", "1536", "1536", "slow", "quick"] * 3
    assert (slow.name, len(slow.seconds), slow.cost.cold_s, slow.cost.cached_s) == ("slow", 3, 7.0, None)
    assert min(slow.seconds) >= 0.02 > quick.median
    # Several passes a round count by their mean. One more product warms up.
    monkeypatch.setattr(queueing.jax, "default_backend", lambda: "gpu")
    slow, _ = timed()
    assert order == (["4096"] * 9 + ["8192"] * 9 + ["slow"] * 8 + ["quick"] * 8) * 3
    assert 0.02 <= min(slow.seconds) < 0.04 and slow.facts()["passes at once"] == 8


def test_passes_are_queued_and_the_last_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(queueing.jax, "block_until_ready", lambda result: (done.append(result), result)[1])
    launches = iter(range(9))
    run = queueing.queue_passes(lambda: next(launches))
    assert (run(), run(3), done) == (0, 3, [0, 3])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"),
        RuntimeError("CUDA out of memory. Tried to"),
        MemoryError("Unable to allocate 5 TiB"),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(workload: Workload) -> Contender:
        if workload.batch > 3:
            raise error
        return Contender("greedy", lambda times=1: None, Cost(0.0))

    monkeypatch.setitem(measure.CONTENDERS, "greedy", Entry(build))
    said: list[str] = []
    fitted, (contender,) = build_fitting(WORK, ["greedy"], said.append)
    assert (fitted.batch, contender.name) == (2, "greedy")
    assert said == [
        "forward, Ti/16, batch 8, float32: out of memory: trying batch 4",
        "forward, Ti/16, batch 4, float32: out of memory: trying batch 2",
    ]


def test_one_image_that_does_not_fit_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(message: str) -> Any:
        def build(workload: Workload) -> Contender:
            raise RuntimeError(message)

        return build

    monkeypatch.setitem(measure.CONTENDERS, "greedy", Entry(failing("RESOURCE_EXHAUSTED")))
    with pytest.raises(OutOfMemoryError, match="batch 1, float32: one image does not fit"):
        build_fitting(WORK, ["greedy"], lambda line: None)
    monkeypatch.setitem(measure.CONTENDERS, "greedy", Entry(failing("no such layer")))
    with pytest.raises(RuntimeError, match=r"^no such layer$"):
        build_fitting(WORK, ["greedy"], lambda line: None)


def test_a_compilation_is_cold_then_cached_in_any_process(tmp_path: Any) -> None:
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    reads: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: reads.append(event))

    x = jnp.ones((64, 64))

    def function(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ x) @ x

    for _ in range(2):  # with a shared cache, the second would find the entry of the first
        reads.clear()
        call, cost = compile_twice(function, x)
        assert [e.rsplit("/", 1)[1] for e in reads if "cache_hit" in e or "cache_miss" in e] == [
            "cache_misses",
            "cache_hits",
        ]
    # Two products of 64^3, and 64^2 tanh.
    assert cost.flops == pytest.approx(4 * 64**3, rel=0.05)
    # Argument and result, and at least one intermediate between them.
    assert 3 * 64 * 64 * 4 <= cost.bytes < 10 * 64 * 64 * 4
    assert jnp.array_equal(call(x), jax.jit(function)(x))
    assert jax.config.jax_compilation_cache_dir == before  # type: ignore[attr-defined]


def test_what_is_donated_counts_once() -> None:
    x = jnp.ones((256, 256))
    (_, kept), (_, given) = (compile_twice(lambda x: 2 * x, x, donate=donate) for donate in ((), (0,)))
    assert kept.bytes == 2 * x.nbytes and given.bytes == x.nbytes


@pytest.mark.parametrize(("device", "small", "large", "times"), [("cpu", 1024, 1536, 1), ("gpu", 4096, 8192, 8)])
@pytest.mark.parametrize("best", ["small", "large"])
def test_the_roofline_is_the_median_of_the_best_side(
    best: str, device: str, small: int, large: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    # The first product of each round warms up, and takes a day. The large product has 3.4 or 8 times the operations: in
    # half again as long it has the higher rate, in nine times as long the lower one.
    lasting = {small: (9.0, 1.0, 2.0), large: (0.2, 4.0, 3.0) if best == "large" else (0.2, 20.0, 18.0)}
    rounds = {side: iter([each for s in seconds for each in (DAY, *[s] * times)]) for side, seconds in lasting.items()}

    def run(side: int) -> None:
        nonlocal now
        now += next(rounds[side])

    stand_in(monkeypatch, run)
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now)
    monkeypatch.setattr(roofline.jax, "default_backend", lambda: device)
    timed = Roofline(WORK.numerics)
    for _ in range(3):
        timed.measure()
    assert timed.flops() == (2 * large**3 / 3.0 if best == "large" else 2 * small**3 / 2.0)


def test_a_product_is_computed_and_awaited_when_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[jax.Array] = []
    wait = jax.block_until_ready
    monkeypatch.setattr(roofline, "_SIDES", {jax.default_backend(): (16,)})
    monkeypatch.setattr(queueing.jax, "block_until_ready", lambda value: waited.append(value) or wait(value))
    timed = Roofline(WORK.numerics)
    for _ in range(3):
        timed.measure()
    # Each once to warm up and once timed: six products, and no result is reused.
    assert len({id(product) for product in waited}) == len(waited) == 6
    x = np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32)
    np.testing.assert_allclose(waited[-1], x @ x, rtol=1e-4, atol=1e-4)  # sums of 16 in single precision, in some order


def test_contenders_and_roofline_are_traced_in_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def build(workload: Workload) -> Contender:
        seen.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return Contender("one", lambda times=1: None, Cost(0.0))

    def product(side: int, dtype: Any) -> Callable[[], None]:
        seen.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return lambda: None

    monkeypatch.setitem(measure.CONTENDERS, "one", Entry(build))
    monkeypatch.setattr(roofline, "_product", product)
    workload = WORK._replace(precision="tensorfloat32")
    build_fitting(workload, ["one"], lambda line: None)
    Roofline(workload.numerics)
    assert set(seen) == {"tensorfloat32"}


def test_what_was_not_said_suits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_workloads([], [], [], []) == [WORK, WORK._replace(what="train")]
    monkeypatch.setattr(session.jax, "default_backend", lambda: "gpu")
    assert [str(work) for work in list_workloads([], [], [], ["train"])] == [
        "train, B/16, batch 128, float32",
        "train, B/16, batch 128, mixed",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["B"], [1], [], []), "variant is 'B'"),
        ((["B/16"], [0], [], []), "batch is 0: give a positive number"),
        ((["B/16"], [1], ["float8"], []), "precision is 'float8': give one of float32, tensorfloat32, mixed, float16"),
        ((["B/16"], [1], [], ["backward"]), "pass is 'backward': give one of forward, train"),
    ],
)
def test_what_is_not_known_is_said(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_workloads(*arguments)


def hidden(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None if name in names else find(name))


def test_an_implementation_has_to_be_known_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"implementation is 'timm': give one of vit_ref, vit_ref-cudnn, FlaxViT, "):
        list_implementations(["timm"])
    hidden(monkeypatch, "torch")
    said = r"^PyTorch's ViT needs torch: pip install 'vit-ref\[suite,torch\]'$"
    for name in ("PyTorch", "torch.compile"):
        with pytest.raises(InputError, match=said):
            list_implementations(["vit_ref", name])


@pytest.mark.parametrize(("flax", "torch"), [(True, False), (False, True)])
def test_what_is_installed_is_found(flax: bool, torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise InputError("FlaxViT needs transformers")

    fake = {"FlaxViT": (lambda: None) if flax else missing, "vit_ref-cudnn": missing}
    for name, require in fake.items():
        monkeypatch.setitem(measure.CONTENDERS, name, measure.CONTENDERS[name]._replace(require=require))
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: torch or name != "torch" or None)
    assert list_implementations([]) == ["vit_ref", *["FlaxViT"] * flax, *["PyTorch", "torch.compile"] * torch]


def test_pytorchs_first_call_stands_for_its_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def build(workload: Workload, rate: float, *, compiles: bool) -> Any:
            return (lambda: compiles), 3.0

    monkeypatch.setitem(sys.modules, "vit_ref.bench.torch_vit", Module)  # type: ignore[arg-type]
    eager, compiled = (contenders.CONTENDERS[name].build(WORK) for name in ("PyTorch", "torch.compile"))
    assert (eager.name, eager.run(), eager.cost) == ("PyTorch", False, Cost(3.0, None, None, None))
    assert (compiled.name, compiled.run()) == ("torch.compile", True)


def test_what_is_asked_for_twice_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_workloads(["Ti/16"] * 2, [8, 8], ["float32"] * 2, ["forward"] * 2) == [WORK]
    assert list_implementations(["vit_ref", "vit_ref"]) == ["vit_ref"]

    def build(workload: Workload) -> Contender:
        if workload.batch > 2:
            raise MemoryError
        return Contender("vit_ref", lambda times=1: None, Cost(0.0))

    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", Entry(build))
    stand_in(monkeypatch)
    # The larger batch is halved down to the smaller one.
    found = session.time_workloads(["Ti/16"], [4, 2], ["float32"], ["forward"], ["vit_ref"], 2, lambda line: None)
    assert [timing.workload.batch for group in found for timing in group] == [2]


def test_a_precision_that_the_device_has_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    ready = Entry(lambda workload: Contender("vit_ref", lambda times=1: None, Cost(0.0)))
    monkeypatch.setitem(measure.CONTENDERS, "vit_ref", ready)
    said: list[str] = []
    list(session.time_workloads(["Ti/16"], [1], ["tensorfloat32"], ["forward"], ["vit_ref"], 2, said.append))
    assert said == ["tensorfloat32: products are float32 (asked tensorfloat32: this cpu rounds nothing)"]


def test_a_workload_that_nothing_can_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    stand_in(monkeypatch)
    ready = Contender(FUSED, lambda times=1: None, Cost(0.0))
    monkeypatch.setitem(measure.CONTENDERS, FUSED, measure.CONTENDERS[FUSED]._replace(build=lambda workload: ready))
    said: list[str] = []
    found = session.time_workloads(["Ti/16"], [8], ["float32", "mixed"], ["forward"], [FUSED], 2, said.append)
    assert [[timing.workload.precision for timing in timings] for timings in found] == [["mixed"]]
    assert len([line for line in said if "is left out" in line]) == 1


def test_the_own_model_is_timed_with_both_kinds_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(config: object, dtype: object, attention: object) -> None:
        asked.append(attention)
        raise InterruptedError

    monkeypatch.setattr(contenders, "skeleton", stop)
    for name in ("vit_ref", FUSED):
        with pytest.raises(InterruptedError):
            contenders.CONTENDERS[name].build(WORK)
    assert asked == [None, cudnn]


def test_cudnns_attention_is_a_contender_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_capability", lambda: 0.0)
    assert FUSED not in list_implementations([])
    with pytest.raises(InputError, match="cuDNN's attention needs an NVIDIA GPU"):
        list_implementations([FUSED])
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    assert FUSED in list_implementations([])
    assert list_implementations([FUSED]) == [FUSED]


def test_cudnns_attention_is_timed_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["vit_ref", FUSED]
    half, full = (session.select_able(WORK._replace(precision=name), named) for name in ("mixed", "float32"))
    assert (half, full) == (named, ["vit_ref"])
    monkeypatch.setattr(attention, "_capability", lambda: 8.0)
    stand_in(monkeypatch)
    for name in named:
        ready = Contender(name, lambda times=1: None, Cost(0.0))
        build = measure.CONTENDERS[name]._replace(build=lambda workload, ready=ready: ready)
        monkeypatch.setitem(measure.CONTENDERS, name, build)
    said: list[str] = []
    found = session.time_workloads(["Ti/16"], [8], ["float32", "mixed"], ["forward"], named, 2, said.append)
    assert [[timing.name for timing in timings] for timings in found] == [["vit_ref"], named]
    why = "cuDNN's attention takes half precision: give --precision mixed"
    assert f"{WORK}: vit_ref-cudnn is left out: {why}" in said
    with pytest.raises(InputError, match=f"^{why}$"):
        next(session.time_workloads(["Ti/16"], [8], ["float32"], ["forward"], [FUSED], 2, said.append))
