"""A whole fine-tuning run: load, train, validate, save, export. It can resume from any checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vit_ref import preprocessing
from vit_ref.errors import InputError
from vit_ref.files import replacing, require_local
from vit_ref.finetune.augmentation import Augmentation, Transform
from vit_ref.finetune.data import ImageDataset
from vit_ref.finetune.directory import CHECKPOINTS, MODEL, RECIPE, require_free
from vit_ref.finetune.loading import count_batches, draw, load_batches
from vit_ref.finetune.mesh import Sharding, choose_shardings, divide_batch, make_mesh, replicate
from vit_ref.finetune.metrics import Evaluation
from vit_ref.finetune.optimizer import make_schedule, make_transformation, select_trained
from vit_ref.finetune.prediction import compute_logits
from vit_ref.finetune.recipe import Recipe
from vit_ref.finetune.record import Record
from vit_ref.finetune.saves import Progress, Saves
from vit_ref.finetune.start import make_starting_model
from vit_ref.finetune.step import split_step
from vit_ref.model.config import ViTConfig
from vit_ref.model.vit import VisionTransformer
from vit_ref.weights.pretrained import get_arrays, replace_arrays, save_pretrained


@dataclasses.dataclass(frozen=True)
class Conduct:
    """Options of a run that do not change its result.

    Attributes:
      num_workers: number of processes that load images; 0 for threads of this process.
      save_steps: number of steps between two checkpoints; None for checkpoints only after each epoch.
      save_total_limit: number of latest checkpoints to keep, besides the best.
      sharding: placement of the parameters on several devices: "data" or "fsdp", see `mesh.choose_shardings`.
      tensorboard: whether to write TensorBoard's files too.
      quiet: whether to hide the progress bar.
    """

    num_workers: int = 0
    save_steps: int | None = None
    save_total_limit: int = 2
    sharding: Sharding = "data"
    tensorboard: bool = False
    quiet: bool = False


class Outcome(NamedTuple):
    """Result of a run.

    Attributes:
      model: the best model of all epochs, in evaluation mode.
      directory: the Hugging Face directory that holds it.
      evaluation: its evaluation on the validation images.
      epoch: the epoch after which it was the best.
      writes: whether this process writes files. Only the first of several does.
    """

    model: VisionTransformer
    directory: Path
    evaluation: Evaluation
    epoch: int
    writes: bool


def finetune(
    source: str | os.PathLike[str] | None,
    training: ImageDataset,
    validation: ImageDataset,
    output_dir: str | os.PathLike[str],
    recipe: Recipe = Recipe(),  # noqa: B008  # it is frozen
    conduct: Conduct = Conduct(),
    *,
    resume: bool = False,
    augment: Callable[..., Any] | None = None,
    ignore: Iterable[str] = (),
) -> Outcome:
    """Fine-tunes a checkpoint on images, and saves the model that does best on the validation images.

    Args:
      source: a checkpoint as `vit_ref.from_pretrained` takes it; None for a small model from scratch.
      training: the training images.
      validation: the validation images, of the same classes.
      output_dir: the run's directory: metrics.jsonl, timing.jsonl, checkpoints/, model/.
      recipe: the choices that decide the result.
      conduct: the choices that do not.
      resume: whether to continue from the last checkpoint in `output_dir`, if there is one. Parameters and metrics are
        then equal, bit for bit, to those of a run that was never stopped.
      augment: takes the place of `Augmentation()`, see `loading.load_batches`.
      ignore: names or patterns of tensors in the checkpoint to leave behind.

    Returns:
      The best model, its directory and its evaluation.

    Raises:
      InputError: checkpoint, images or recipe cannot be used, or `output_dir` holds another run or cannot be written.
    """
    require_local(output_dir, "output_dir")
    out = Path(output_dir)
    if jax.process_index() == 0:
        require_free(out, resume=resume)
    mesh = make_mesh(recipe.batch_size)
    if training.classes != validation.classes:
        raise InputError("the training and the validation images have different classes: give both the same folders")
    per_epoch = count_batches(len(training), recipe.batch_size)
    if not per_epoch:
        raise InputError(
            f"batch_size is {recipe.batch_size}: there are only {len(training)} training images: give a smaller batch"
        )
    if not len(validation):
        raise InputError("there are no validation images: give at least one")
    if len(training.classes) < 2:
        raise InputError(
            f"there is only one class, {training.classes[0]}: give at least two, each in a folder of its own"
        )
    steps = per_epoch * recipe.epochs
    updates = steps // recipe.grad_accum_steps
    if not updates:
        raise InputError(
            f"grad_accum_steps is {recipe.grad_accum_steps}: there are only {steps} steps, so the run would learn"
            " nothing: give a smaller number"
        )
    model = make_starting_model(source, training.classes, recipe, ignore)
    config, blocks = model.config, model.config.num_hidden_layers
    augment = (augment or Augmentation()) if recipe.augment else None
    _require_images(config, recipe, (training, augment), (validation, None))
    optimizer = nnx.Optimizer(model, make_transformation(recipe, updates, blocks), wrt=select_trained(recipe, blocks))
    model.train()
    graph, state = nnx.split((model, optimizer))
    layout = choose_shardings(state, model.config, mesh, conduct.sharding)
    state = jax.device_put(state, layout)
    learn = compile_step(graph, layout, mesh, recipe)
    look = Examiner(model, mesh)
    # "fsdp" divides parameters and moments over the devices. These would be whole copies on the first device.
    del model, optimizer

    shard = (jax.process_index(), jax.process_count())
    loader = load_batches(
        training,
        config,
        batch_size=recipe.batch_size // shard[1],
        seed=recipe.seed,
        epochs=recipe.epochs,
        augment=augment,
        num_workers=conduct.num_workers,
        shard=shard,
    )
    _require_same_run(out, recipe, source, training, validation)
    saves = Saves(out / CHECKPOINTS, conduct.save_total_limit)
    done = saves.latest() if resume else None
    if done is not None:
        state = replace_arrays(state, saves.restore(done, get_arrays(state)))
        loader.set_state(saves.progress(done).loader)
    done = done or 0
    first = jax.process_index() == 0
    record = Record(
        out,
        recipe,
        make_schedule(recipe, updates),
        per_epoch,
        done,
        writes=first,
        tensorboard=conduct.tensorboard,
        quiet=conduct.quiet,
    )
    evaluations: dict[int, Evaluation] = {}
    with contextlib.closing(loader), contextlib.closing(record):
        for step in range(done + 1, steps + 1):
            batch = next(loader)
            pixels, labels = divide_batch(batch["pixels"], mesh), divide_batch(batch["label"], mesh)
            state, loss = learn(state, pixels, labels, np.int32(step))
            record.step(step, loss)
            epoch_ends = step % per_epoch == 0
            if not epoch_ends and (conduct.save_steps is None or step % conduct.save_steps):
                continue
            record.flush()
            accuracy = None
            if epoch_ends:
                evaluation = evaluations[step] = look(get_model_state(state), validation, recipe, conduct)
                accuracy = evaluation.accuracy, evaluation.loss
                record.validated(step, evaluation)
            saves.save(get_arrays(state), Progress(step, loader.get_state(), accuracy))
    saves.wait()
    best = saves.best()
    if best is None:
        raise InputError(
            f"{out / CHECKPOINTS}: no checkpoint has an accuracy in it: start a new run in another directory"
        )
    state = replace_arrays(state, saves.restore(best, get_arrays(state)))
    saves.close()
    # For an epoch before a resume only the metrics are known, and not the confusions.
    evaluation = evaluations.get(best) or look(get_model_state(state), validation, recipe, conduct)
    model = nnx.merge(graph, gather(state, mesh))[0]
    model.eval()
    if first:
        save_pretrained(model, out / MODEL)
    return Outcome(model, out / MODEL, evaluation, best // per_epoch, first)


def summarise(outcome: Outcome) -> str:
    """Summarises a finished run in a few lines of text."""
    evaluation, names = outcome.evaluation, outcome.model.config.class_names
    rows, columns = np.nonzero(evaluation.confusion)
    confused = [(int(evaluation.confusion[i, j]), i, j) for i, j in zip(rows, columns, strict=True) if i != j]
    return "\n".join(
        [
            f"best after epoch {outcome.epoch}: {evaluation.accuracy:.1%} of {evaluation.images} validation images,"
            f" loss {evaluation.loss:.3f}",
            *(
                f"  {names[i]} taken for {names[j]}: {count}"
                for count, i, j in sorted(confused, key=lambda each: -each[0])[:3]
            ),
            f"model: {outcome.directory}",
        ]
    )


def compile_step(graph: Any, layout: Any, mesh: Mesh, recipe: Recipe) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns a compiled function (state, pixels, labels, step) -> (state, loss). It splits the state only once."""
    key = jax.random.key(recipe.seed)

    def learn(state: Any, pixels: jax.Array, labels: jax.Array, step: jax.Array) -> tuple[Any, jax.Array]:
        rngs = nnx.Rngs(dropout=jax.random.fold_in(key, step))
        return split_step(graph, state, pixels, labels, rngs, recipe.label_smoothing)

    return jax.jit(learn, donate_argnums=0, out_shardings=(layout, replicate(mesh)))


class Examiner:
    """Evaluation of a model's states on the validation images.

    Args:
      model: a model with the computation to use.
      mesh: the mesh that divides the images.
    """

    def __init__(self, model: VisionTransformer, mesh: Mesh):
        self._mesh, self._config = mesh, model.config
        graph = nnx.graphdef(model)

        def run(state: Any, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            return compute_logits(graph, state, pixels).astype(np.float32), labels

        # Every process gets all logits, so that all agree which epoch was the best.
        self._run = jax.jit(run, out_shardings=replicate(mesh))

    def __call__(self, state: Any, dataset: ImageDataset, recipe: Recipe, conduct: Conduct) -> Evaluation:
        """Returns the evaluation of one state of the model."""
        shard = (jax.process_index(), jax.process_count())
        seen = [
            self._run(state, divide_batch(batch["pixels"], self._mesh), divide_batch(batch["label"], self._mesh))
            for batch in load_batches(
                dataset,
                self._config,
                batch_size=recipe.batch_size // shard[1],
                seed=recipe.seed,
                epochs=1,
                augment=None,
                num_workers=conduct.num_workers,
                shard=shard,
                shuffle=False,
                drop_remainder=False,
            )
        ]
        logits, labels = (np.concatenate([np.asarray(each[k]) for each in seen]) for k in (0, 1))
        return Evaluation.of_logits(logits, labels)


def get_model_state(state: Any) -> Any:
    """Returns the model's part of the state of (model, optimizer)."""
    return state[0]


def gather(state: Any, mesh: Mesh) -> Any:
    """Returns the state with every array whole on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicate(mesh))(state)


def _require_images(
    config: ViTConfig, recipe: Recipe, *loaded: tuple[ImageDataset, Augmentation | Transform | None]
) -> None:
    """Draws the first image of each data set before anything is written, to check that it fits the model."""
    size = preprocessing.steps(config).output
    if size not in (None, config.image_hw):
        raise InputError(
            f"preprocessing makes images of {list(size)} pixels, and the model takes {list(config.image_hw)}: correct"
            " preprocessor_config.json"
        )
    for dataset, augment in loaded:
        draw(dataset, config, augment, recipe.seed, 0, 0)


def _require_same_run(
    out: Path,
    recipe: Recipe,
    source: str | os.PathLike[str] | None,
    training: ImageDataset,
    validation: ImageDataset,
) -> None:
    """Writes the choices that decide the result, or compares them with those that the directory holds."""
    file = out / RECIPE
    described: dict[str, Any] = {
        "checkpoint": None if source is None else os.fspath(source),
        "training_images": _told_apart(training),
        "validation_images": _told_apart(validation),
        "classes": list(training.classes),
        "recipe": recipe.to_json(),
    }
    try:
        before = json.loads(file.read_bytes()) if file.exists() else None
        # A run may be older than a field. The field then has its default.
        default = Recipe().to_json()
        was, now = (
            {**each, **default, **each["recipe"]} for each in (described if before is None else before, described)
        )
        changed = [name for name in now if name != "recipe" and now[name] != was[name]]
        if before is None and jax.process_index() == 0:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(file) as staged:
                staged.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: it cannot be written or read ({error}): give another directory") from None
    for name in changed:
        raise InputError(
            f"{file}: {name} was {was[name]!r} and is now {now[name]!r}: resume with the old value, or give another"
            " directory"
        )


def _told_apart(dataset: ImageDataset) -> str:
    """Returns the number of images, and a checksum of their names and labels, whatever their directory."""
    files = [
        (os.path.basename(name), label) for name, label in zip(dataset.names, dataset.labels.tolist(), strict=True)
    ]
    return f"{len(dataset)} ({zlib.crc32(ascii(files).encode()):08x})"
