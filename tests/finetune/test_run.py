"""Does a run end with the right model, whatever stops it on the way, and on any number of devices?"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from PIL import Image

import vit_ref
from tests.helpers.finetuning import STEPS, Runner
from vit_ref.errors import InputError
from vit_ref.finetune import run
from vit_ref.finetune.augmentation import Augmentation
from vit_ref.finetune.data import ImageDataset, open_dataset
from vit_ref.finetune.loading import load_batches
from vit_ref.finetune.metrics import Evaluation, read_metrics
from vit_ref.finetune.optimizer import make_schedule, make_transformation, select_trained
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.run import Conduct, _require_same_run, finetune
from vit_ref.finetune.start import SCRATCH, make_starting_model
from vit_ref.finetune.step import train_step
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer
from vit_ref.preprocessing import preprocess
from vit_ref.verify.report import summary
from vit_ref.weights.pretrained import get_parameters, get_state_parameters

pytestmark = pytest.mark.xdist_group("runs")


def test_the_best_epoch_is_saved_and_does_what_was_measured(runner: Runner, whole_run: tuple) -> None:
    printed, _ = whole_run
    model = vit_ref.from_pretrained(runner.directory / "whole" / "model")
    validation = open_dataset(None, "validation")
    assert model.config.labels == validation.classes
    found = sum(
        (
            Evaluation.of_logits(model(batch["pixels"]), batch["label"])
            for batch in load_batches(validation, model.config, batch_size=64, seed=0, epochs=1, shuffle=False)
        ),
        start=Evaluation.empty(4),
    )
    lines = read_metrics(runner.directory / "whole" / "metrics.jsonl")
    measured = [line for line in lines if "validation_accuracy" in line]
    best = max(measured, key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))
    assert found.images == 128
    # Far better than chance, so the run learnt something.
    assert found.accuracy == best["validation_accuracy"] > 0.4
    assert found.per_class.tolist() == best["validation_accuracy_by_class"]
    assert found.loss == pytest.approx(best["validation_loss"], rel=1e-5)  # another batch size sums in another order
    assert f"best after epoch {best['epoch']}: {found.accuracy:.1%} of 128" in printed
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[0]["learning_rate"] == pytest.approx(0.003)
    assert steps[-1]["learning_rate"] == pytest.approx(0.003 / STEPS)
    assert np.mean([line["loss"] for line in steps[-4:]]) < steps[0]["loss"] - 0.2


def test_what_is_saved_is_verified(runner: Runner, whole_run: tuple) -> None:
    report = vit_ref.check_port(None, runner.directory / "whole" / "model", reference="numpy", backward=False)
    assert report.passed, summary(report)


def test_transformers_loads_what_is_saved(runner: Runner, whole_run: tuple) -> None:
    directory = runner.directory / "whole" / "model"
    flax = transformers.FlaxViTForImageClassification.from_pretrained(directory)
    ours = vit_ref.from_pretrained(directory)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = np.asarray(flax(images.transpose(0, 3, 1, 2)).logits)
    # Both round float32 sums of 64 terms through two blocks. Another formula is 1e-3 off.
    np.testing.assert_allclose(ours(images), logits, atol=2e-5)
    assert flax.config.id2label == dict(enumerate(open_dataset(None, "train").classes))


def test_transformers_reads_the_pixels_of_a_run_from_scratch(runner: Runner, whole_run: tuple) -> None:
    directory = runner.directory / "whole" / "model"
    image = open_dataset(None, "validation")[0].image
    processor = transformers.AutoImageProcessor.from_pretrained(directory, use_fast=False)
    theirs = processor([image.convert("L")], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    assert theirs.shape == (1, 32, 32, 3)
    assert theirs.tobytes() == preprocess([image.convert("L")], vit_ref.from_pretrained(directory).config).tobytes()


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(runner: Runner, whole_run: tuple) -> None:
    """Kills the run several times, and then lets its disk fill up."""
    out, options = "stopped", ("--save-steps", "3")
    # The first kill comes before the first checkpoint. The second comes in the second epoch, while the run writes a
    # checkpoint, which it does after every third step. Each epoch has eight steps and one line more, so the tenth line
    # is the ninth step.
    for lines in (1, 10):
        runner.killed(out, *options, *(["--resume"] if lines > 1 else []), lines=lines)
    checkpoints = runner.directory / out / "checkpoints"
    good = sorted(path.name for path in checkpoints.iterdir() if path.name.isdigit())
    # The file that does not fit on the disk is one of a checkpoint, because those are the largest.
    said = runner.run(out, *options, "--resume", code=2, blocks=40)
    # Threads of tensorstore may print more after it.
    assert "/checkpoints: the checkpoint cannot be written or read (File too large)\n" in said
    assert good[-1] in {path.name for path in checkpoints.iterdir()}
    runner.here(out, *options, "--resume")
    assert runner.result(out) == whole_run[1]
    # The checkpoint that was being written is gone. The last two and the best of the others remain.
    assert len(list(checkpoints.iterdir())) <= 3


def test_a_finished_run_only_saves_its_model_when_resumed(runner: Runner, whole_run: tuple) -> None:
    (runner.directory / "whole" / "model" / "model.safetensors").unlink()
    runner.here("whole", "--resume")
    assert runner.result("whole") == whole_run[1]


def losses(runner: Runner, out: str) -> np.ndarray:
    lines = read_metrics(runner.directory / out / "metrics.jsonl")
    return np.array([line.get("loss", line.get("validation_loss")) for line in lines])


# Sums of float32 in another order, over sixteen steps of Adam. Another image in one batch makes 1e-3.
CLOSE = 5e-5


@pytest.fixture(scope="module")
def one_block(runner: Runner) -> str:
    """Writes a checkpoint like the model of a run from scratch, but of one block, which compiles faster."""
    config = dataclasses.replace(SCRATCH, num_hidden_layers=1, num_labels=4)
    vit_ref.save_pretrained(VisionTransformer(config, rngs=nnx.Rngs(0)), runner.directory / "one-block")
    return str(runner.directory / "one-block")


@pytest.fixture(scope="module")
def steady(runner: Runner, one_block: str) -> np.ndarray:
    """Returns the losses of one device without dropout, because masks depend on the layout of arrays."""
    runner.here("steady", one_block, "--dropout", "0")
    return losses(runner, "steady")


def test_two_devices_learn_what_one_learns(runner: Runner, steady: np.ndarray, one_block: str) -> None:
    """Divides the batch alone. Arrays are divided between the devices of two processes, below."""
    runner.run("two-devices", one_block, "--dropout", "0", "--sharding", "data", devices=2)
    np.testing.assert_allclose(losses(runner, "two-devices"), steady, rtol=CLOSE)
    assert not divided(runner, "two-devices")


def test_two_processes_learn_what_one_learns(runner: Runner, steady: np.ndarray, one_block: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    # "data" divides only the batch, so the processes share less.
    out = "two-processes"
    together = (one_block, "--dropout", "0", "--sharding", "fsdp")
    together += ("--coordinator", coordinator, "--num-processes", "2")
    processes = [runner.start(out, *together, "--process-id", str(k), devices=2) for k in (0, 1)]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended[0][1][-2000:] + ended[1][1][-2000:]
    assert "best after epoch" in ended[0][0]
    assert "best after epoch" not in ended[1][0]
    np.testing.assert_allclose(losses(runner, out), steady, rtol=CLOSE)
    assert divided(runner, out)


def divided(runner: Runner, out: str) -> bool:
    """Tells whether devices shared a saved array, from Orbax's notes. The losses are the same either way."""
    noted = json.loads(next((runner.directory / out / "checkpoints").rglob("_sharding")).read_text())
    return any(any(json.loads(each)["partition_spec"]) for each in noted.values())


def _tiny(directory: Path) -> tuple[Path, ImageDataset, ImageDataset]:
    """Makes a checkpoint of two narrow blocks, 14 training images and 6 validation images."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
    )
    vit_ref.save_pretrained(VisionTransformer(config, rngs=nnx.Rngs(0)), directory / "start")
    training, validation = (
        dataclasses.replace(images, names=images.names[:k], labels=images.labels[:k], rows=images.rows[:k])
        for images, k in ((open_dataset(None, "train"), 14), (open_dataset(None, "validation"), 6))
    )
    return directory / "start", training, validation


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ("other", "b", "c", "d")}, "have different classes: give both the same folders"),
        ({"names": (), "labels": np.zeros(0, int), "rows": np.zeros(0, int)}, "there are no validation images: give"),
    ],
)
def test_images_that_nothing_can_be_validated_with_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    start, training, validation = _tiny(tmp_path)
    with pytest.raises(InputError, match=said):
        finetune(
            start,
            training,
            dataclasses.replace(validation, **change),
            tmp_path / "run",
            Recipe(batch_size=4),
            Conduct(quiet=True),
        )
    assert not (tmp_path / "run").exists()


def test_a_url_is_no_place_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, training, validation = _tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^output_dir is gs:/bucket/run: a URL is no path on this machine"):
        finetune(start, training, validation, Path("gs://bucket/run"), Recipe(batch_size=4), Conduct(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(
    ("preprocessor", "said"),
    [
        ({"size": {"shortest_edge": 8}}, r"^preprocessor_config\.json: size is {'shortest_edge': 8}: give a height"),
        (
            {"size": 9},
            r"^preprocessing makes images of \[9, 9\] pixels, and the model takes \[8, 8\]: correct pre",
        ),
        ({"resample": 9}, r"^preprocessor_config\.json: resample is 9: give one of"),
        (
            {"do_resize": False},
            r"^validation image 0: it has 64x64 pixels, the model takes 8x8, and do_resize is false",
        ),
    ],
)
def test_unusable_preprocessing_is_refused_before_any_write(
    preprocessor: dict[str, Any], said: str, tmp_path: Path
) -> None:
    start, training, validation = _tiny(tmp_path)
    (start / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(InputError, match=said):
        finetune(start, training, validation, tmp_path / "run", Recipe(batch_size=4), Conduct(quiet=True))
    assert not (tmp_path / "run").exists()


@jax.numpy_dtype_promotion("standard")
def test_the_best_epoch_is_saved_even_if_it_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, training, validation = _tiny(tmp_path)
    seen: list[dict[str, np.ndarray]] = []

    def look(self: Any, state: Any, dataset: ImageDataset, *_: Any) -> Evaluation:
        seen.append(get_state_parameters(state))
        right = np.eye(len(dataset.classes))[dataset.labels]
        # All right after the first epoch, and all wrong from then on.
        return Evaluation.of_logits(right if len(seen) == 1 else -right, dataset.labels)

    monkeypatch.setattr(run.Examiner, "__call__", look)
    outcome = finetune(
        start, training, validation, tmp_path / "run", Recipe(epochs=3, batch_size=4), Conduct(quiet=True)
    )
    assert (outcome.epoch, outcome.evaluation.accuracy) == (1, 1.0)
    found = get_parameters(outcome.model)
    saved = get_parameters(vit_ref.from_pretrained(outcome.directory))
    assert all(np.array_equal(found[path], seen[0][path]) for path in seen[0])
    assert all(np.array_equal(saved[path], seen[0][path]) for path in seen[0])
    assert not np.array_equal(seen[2]["head.kernel"], seen[0]["head.kernel"])


# optax counts in integers.
@jax.numpy_dtype_promotion("standard")
def test_a_run_is_the_recipes_steps_one_after_another(tmp_path: Path) -> None:
    # Two images of an epoch fill no batch. Two validation images remain for a last one.
    start, training, validation = _tiny(tmp_path)
    recipe = Recipe(
        epochs=2,
        batch_size=4,
        grad_accum_steps=2,
        learning_rate=0.3,
        layer_decay=0.5,
        freeze_blocks=1,
        warmup_ratio=0.4,
        label_smoothing=0.2,
        dropout=0.2,
        seed=3,
    )
    outcome = finetune(start, training, validation, tmp_path / "run", recipe, Conduct(quiet=True))

    model = make_starting_model(start, training.classes, recipe)
    optimizer = nnx.Optimizer(model, make_transformation(recipe, 3, 2), wrt=select_trained(recipe, 2))
    model.train()
    arguments = {"batch_size": 4, "seed": 3, "epochs": 2, "augment": Augmentation()}
    learn = nnx.jit(train_step, static_argnums=5)
    expected, found = [], []
    for step, batch in enumerate(load_batches(training, model.config, **arguments), start=1):
        rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.key(3), step))
        loss = learn(model, optimizer, jnp.array(batch["pixels"]), jnp.array(batch["label"]), rngs, 0.2)
        rate = float(make_schedule(recipe, 3)((step - 1) // 2))
        expected.append({"step": step, "epoch": 1 + (step > 3), "loss": float(loss), "learning_rate": rate})
        if step % 3 == 0:
            model.eval()
            pixels = preprocess([photograph.image for photograph in validation], model.config)
            found.append(Evaluation.of_logits(model(pixels), validation.labels))
            expected.append({"step": step, "epoch": step // 3, "validation_loss": found[-1].loss})
            model.train()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line, wanted in zip(lines, expected, strict=True):
        # Another compilation sums in another order, over six steps. Another mask, image or rate shows in the third
        # digit.
        assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    best = max((0, 1), key=lambda epoch: (found[epoch].accuracy, -found[epoch].loss))
    assert outcome.epoch == best + 1
    assert (outcome.evaluation.confusion == found[best].confusion).all()
    assert all(each.deterministic for _, each in nnx.iter_modules(outcome.model) if isinstance(each, nnx.Dropout))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch-size", "1000"), "batch_size is 1000: there are only 512 training images"),
        (("--learning-rate", "0"), "learning_rate is 0.0: give a number from 1e-12 to 100"),
        (("--grad-accum-steps", "17"), "grad_accum_steps is 17: there are only 16 steps"),
        (("--freeze-blocks", "9"), "freeze_blocks is 9: the model has 2 blocks"),
        (("nowhere",), "nowhere: "),
        (("--data", "/nowhere/images"), "/nowhere/images (train): it is not a directory"),
        (("--coordinator", "127.0.0.1:1"), "only some of --coordinator, --num-processes and --process-id were given"),
        (
            ("--coordinator", "here", "--num-processes", "2", "--process-id", "0"),
            "--coordinator here --num-processes 2",
        ),
        (
            ("--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"),
            "--process-id 2: jax cannot join",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(options: tuple[str, ...], said: str, refused: Callable) -> None:
    assert said in refused("refused", *options)


@jax.numpy_dtype_promotion("standard")
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    start, training, validation = _tiny(tmp_path)
    model = vit_ref.from_pretrained(start)
    model.position_embeddings[...] = model.position_embeddings[...] * 0 + 3e38  # whose sum is no float32
    vit_ref.save_pretrained(model, tmp_path / "large")
    with pytest.raises(InputError, match="the loss at step 1 is nan: lower learning_rate"):
        finetune(tmp_path / "large", training, validation, tmp_path / "run", Recipe(batch_size=4), Conduct(quiet=True))


def test_a_run_is_neither_overwritten_nor_mixed_with_another(refused: Callable, whole_run: tuple) -> None:
    assert "whole: it holds a run already: continue with --resume" in refused("whole")
    line = refused("whole", "--resume", "--epochs", "3")
    assert "run.json: epochs was 2 and is now 3" in line
    assert "run.json: training_images was '512 (" in refused("whole", "--resume", "--classes", "3")


def test_an_earlier_run_is_found_before_jax_is_imported(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    program = (
        "import sys\n"
        "from vit_ref.cli.entry import main\n"
        f"sys.argv = ['vit-ref', 'finetune', '--output-dir', {str(tmp_path)!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print({'jax', 'flax', 'numpy'} & set(sys.modules))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    line = f"vit-ref: {tmp_path}: it holds a run already: continue with --resume, or give another directory\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "set()\n", line)


def test_a_run_goes_on_with_its_own_images_wherever_they_are(tmp_path: Path) -> None:
    def begin(below: str, change: Callable[[ImageDataset], ImageDataset] = lambda dataset: dataset) -> None:
        shapes = (open_dataset(None, split) for split in ("train", "validation"))
        training, validation = (
            dataclasses.replace(each, names=tuple(f"{below}/{name}" for name in each.names)) for each in shapes
        )
        _require_same_run(tmp_path, Recipe(), None, training, change(validation))

    begin("here")
    begin("there")
    for change in (
        lambda images: dataclasses.replace(images, labels=images.labels[::-1]),
        lambda images: dataclasses.replace(images, names=("another", *images.names[1:])),
    ):
        with pytest.raises(InputError, match=r"run\.json: validation_images was '128 \(.{8}\)' and is now '128 \("):
            begin("there", change)


def test_a_run_older_than_a_field_continues_with_its_default(tmp_path: Path) -> None:
    training = open_dataset(None, "train")
    _require_same_run(tmp_path, Recipe(precision="mixed"), None, training, training)
    description = json.loads((tmp_path / "run.json").read_text())
    del description["recipe"]["attention"]
    (tmp_path / "run.json").write_text(json.dumps(description))
    _require_same_run(tmp_path, Recipe(precision="mixed"), None, training, training)
    with pytest.raises(InputError, match=r"run.json: attention was 'xla' and is now 'cudnn'"):
        _require_same_run(tmp_path, Recipe(attention="cudnn", precision="mixed"), None, training, training)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"recipe": 3}', b"\xff"])
def test_a_damaged_description_of_a_run_is_said(content: bytes, refused: Callable, runner: Runner) -> None:
    (runner.directory / "damaged").mkdir(exist_ok=True)
    (runner.directory / "damaged" / "run.json").write_bytes(content)
    assert "damaged/run.json: it cannot be written or read (" in refused("damaged", "--resume")


@pytest.mark.parametrize("name", ["checkpoints", "model", "metrics.jsonl", "timing.jsonl"])
def test_a_directory_of_somebody_elses_is_left_alone(name: str, refused: Callable, runner: Runner) -> None:
    (runner.directory / f"has-{name}" / name).mkdir(parents=True)
    assert f"{name}: it exists and would be overwritten" in refused(f"has-{name}")
    assert [path.name for path in (runner.directory / f"has-{name}").iterdir()] == [name]


def test_plots_that_would_have_no_place_are_said_before_training(refused: Callable, runner: Runner) -> None:
    (runner.directory / "no-place").mkdir()
    (runner.directory / "no-place" / "plots").touch()
    assert "no-place/plots: it is not a directory" in refused("no-place", "--plots")
    assert [path.name for path in (runner.directory / "no-place").iterdir()] == ["plots"]


def test_one_class_is_refused(refused: Callable, tmp_path: Path) -> None:
    for index in range(64):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "cat" / f"{index}.png")
    assert "there is only one class, cat" in refused("one", "--data", str(tmp_path), "--batch-size", "8")


def test_a_folder_of_images_with_a_bad_one_and_the_plots(runner: Runner, one_block: str, tmp_path: Path) -> None:
    drawn = open_dataset(None, "train")
    for index in range(160):
        image, label, _ = drawn[index]
        folder = tmp_path / ("train" if index < 128 else "validation") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    (tmp_path / "train" / "0" / "torn.png").write_bytes((tmp_path / "train" / "0" / "0.png").read_bytes()[:200])
    for place in ("train", "validation"):
        (tmp_path / place / "0" / "far.heic").touch()
    (tmp_path / "train" / "0" / "notes.txt").touch()
    said = runner.here("folder", one_block, "--data", str(tmp_path), "--bad-images", "skip", "--epochs", "1", "--plots")
    assert f"vit-ref: skipped: {tmp_path / 'train' / '0' / 'torn.png'}: not a readable image" in said
    assert "vit-ref: left out, because the suffix is not that of an image: 3 files (2 .heic, 1 .txt)\n" in said
    assert "of 32 validation images" in said
    assert len(list((runner.directory / "folder" / "plots").glob("*.png"))) == 6


def test_a_directory_that_cannot_be_written_to_is_said(refused: Callable, runner: Runner) -> None:
    (runner.directory / "file").touch()
    assert "file/run" in refused("file/run")
