"""Is what was saved also read, only the last few and the best kept, and a full disk seen before a write?"""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_ref.errors import InputError
from vit_ref.finetune.saves import Progress, Saves


def arrays(step: int) -> dict[str, jax.Array]:
    return {"a.kernel": jnp.full((3, 2), step, jnp.float32), "count": jnp.array(step, jnp.int32)}


# In one process, or in two. The second then has to know the best checkpoint of the first.
@pytest.mark.parametrize("stopped", [None, 4, 6])
def test_the_last_and_the_best_are_kept_and_read_back(stopped: int | None, tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=2)
    # The best by accuracy and, among equals, by loss: step 3.
    found = {1: (0.5, 0.9), 2: (0.8, 0.7), 3: (0.8, 0.6), 4: None, 5: (0.7, 0.1), 6: None}
    for step, accuracy in found.items():
        if step == stopped:
            saves.close()
            # A process that is killed while it writes its first checkpoint leaves this.
            (tmp_path / "99.orbax-checkpoint-tmp").mkdir()
            saves = Saves(tmp_path, keep=2)
        saves.save(arrays(step), Progress(step, {"batches": step}, accuracy))
    saves.wait()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 5, 6]
    assert (saves.latest(), saves.best()) == (6, 3)
    assert saves.progress(3) == Progress(3, {"batches": 3}, (0.8, 0.6))
    read = saves.restore(3, arrays(0))
    assert {name: value.tolist() for name, value in read.items()} == {"a.kernel": [[3.0, 3.0]] * 3, "count": 3}
    assert read["count"].dtype == np.int32
    saves.close()


@pytest.mark.parametrize("gone", ["progress", "progress/*"])
def test_what_was_being_deleted_is_gone_and_the_last_one_is_not(gone: str, tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=3)
    for step in (2, 9, 10):
        saves.save(arrays(step), Progress(step, None))
    saves.close()
    for path in (tmp_path / "9").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    saves = Saves(tmp_path, keep=3)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 10] and saves.latest() == 10
    saves.close()
    shutil.rmtree(tmp_path / "10" / "progress")
    with pytest.raises(InputError, match=r"/10: the checkpoint cannot be written or read .* remove it, and --resume"):
        Saves(tmp_path, keep=3)


def test_what_is_saved_may_be_overwritten_at_once(tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=1)
    values = {"a": jnp.zeros(2**22, jnp.float32)}
    following = jax.jit(lambda a: a + 1, donate_argnums=0).lower(values["a"]).compile()
    saves.save(values, Progress(1, None))
    following(values["a"])
    saves.wait()
    assert not np.asarray(saves.restore(1, {"a": jnp.ones(2**22, jnp.float32)})["a"]).any()
    saves.close()


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = Saves(tmp_path, keep=1)
    saves.save(arrays(1), Progress(1, None))
    saves.wait()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(16))
    with pytest.raises(InputError, match=r"a checkpoint takes .* MiB, and the disk has .* left: make room"):
        saves.save(arrays(2), Progress(2, None))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    saves.close()


def test_the_arrays_of_another_model_are_refused(tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=1)
    saves.save(arrays(1), Progress(1, None))
    saves.wait()
    with pytest.raises(InputError, match="checkpoint cannot be written or read"):
        saves.restore(1, {"a.kernel": jnp.zeros((5, 5))})
    saves.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "progress" / "metadata").unlink(),
        lambda step: (step / "progress" / "metadata").write_text('{"batches": 1}'),
        lambda step: (step / "progress" / "metadata").write_text("[1]"),
        lambda step: shutil.rmtree(step / "arrays"),
        lambda step: [file.write_bytes(file.read_bytes()[:-9]) for file in step.glob("arrays/**/d/*")],
    ],
    ids=["no progress", "another progress", "no object", "no arrays", "torn arrays"],
)
# The first array to fail ends the event loop of Orbax, and tensorstore may fail later with the next array.
@pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_with_the_way_on(damage: Callable[[Path], object], tmp_path: Path) -> None:
    saves = Saves(tmp_path, keep=1)
    saves.save(arrays(1), Progress(1, {"batches": 1}))
    saves.close()
    damage(tmp_path / "1")
    with pytest.raises(InputError, match=r"/1: the checkpoint cannot be .*: remove it, and --resume continues from"):
        Saves(tmp_path, keep=1).restore(1, arrays(1))
