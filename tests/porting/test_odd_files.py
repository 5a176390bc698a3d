"""Is a checkpoint with odd but valid JSON used, or refused with a message, and never with a traceback?

A traceback ends with exit code 1, which means that a check failed.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from vit_ref.errors import InputError, ReferenceUnavailableError
from vit_ref.finetune.prediction import predict
from vit_ref.model.config import ViTConfig
from vit_ref.verify.cases import Case
from vit_ref.verify.photographs import pixels_for
from vit_ref.verify.references.choice import REFERENCES, reference_for
from vit_ref.verify.session import prepare_candidate
from vit_ref.verify.vit import hf_tensors
from vit_ref.weights import checkpoint, pretrained, writing
from vit_ref.weights.conversion import convert

CONFIG = ViTConfig(
    hidden_size=6,
    num_attention_heads=3,
    num_hidden_layers=1,
    intermediate_size=7,
    image_size=8,
    patch_size=4,
    num_labels=3,
    labels=("a", "b", "c"),
)
CONTENT = {
    **CONFIG.to_hf(),
    "problem_type": "single_label_classification",
    "torch_dtype": "float32",
    "transformers_version": "4.57.6",
    "encoder_stride": 4,
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_center_crop": False,
    "crop_size": {"height": 8, "width": 8},
    "do_convert_rgb": None,
}
# Fields that no file here has and that some reader knows.
OTHERS = {
    "config": (
        *("return_dict", "quantization_config", "pruned_heads", "dtype", "num_labels", "use_return_dict", "labels"),
        *(
            "attn_implementation",
            "output_attentions",
            "torchscript",
            "pooler_output_size",
            "pooler",
            "extra",
            "architecture",
        ),
        *("chunk_size_feed_forward", "preprocessor", "broadcast_attention_dropout", "pretrained_cfg", "model_args"),
    ),
    "preprocessor": ("do_pad", "do_thumbnail", "crop_pct", "feature_extractor_type"),
    "header": ("__metadata__", "vit.pooler.dense.weight", "step", "params/x"),
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-300, 1e308),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "0",
        "1",
        "gelu",
        "float32",
        "torch.float32",
        "null",
        "é\x00\ud800",
        "x" * 9999,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [1, 2],
        [4, 4],
        [8, 8],
        [1, 2, 3],
        [-1, 6],
        [10**30, 0],
        {"0": "a"},
        {"0": None},
        {"": 0},
    ),
    *(
        {"height": 8},
        {"height": 8, "width": -8},
        {"shortest_edge": 8},
        {"a": {"a": {"a": []}}},
        ["F32"],
        "F8_E4M3",
        "F64",
    ),
    *({"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, {"dtype": "F32"}),
)
# numpy's warning about a factor that overflows float32. The logits are then not finite, and the message says so.
NOISE = ("overflow encountered", "invalid value encountered", "divide by zero encountered")


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths to every value in a JSON object."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(content: dict[str, Any], others: tuple[str, ...], draw: np.random.Generator) -> dict[str, Any]:
    """Returns a copy with one to three values changed, removed or added."""
    result = copy.deepcopy(content)
    for _ in range(draw.integers(1, 4)):
        paths = list(places(result))
        if not paths or draw.random() < 0.2:
            result[others[draw.integers(len(others))]] = ODD[draw.integers(len(ODD))]
            continue
        *way, last = paths[draw.integers(len(paths))]
        inner: Any = result
        for key in way:
            inner = inner[key]
        if draw.random() < 0.15:
            del inner[last]
        elif isinstance(inner, dict) and draw.random() < 0.1:
            inner[f"{last}."] = inner.pop(last)
        else:
            inner[last] = copy.deepcopy(ODD[draw.integers(len(ODD))])
    return result


class Files:
    """The files of a right checkpoint, and the same with one of them odd."""

    def __init__(self, directory: Path):
        self.directory = directory
        source = Case("odd", CONFIG).checkpoint()
        writing.write_directory(directory, source.tensors, CONTENT, PREPROCESSOR)
        whole = (directory / checkpoint.WEIGHTS).read_bytes()
        length = 8 + int.from_bytes(whole[:8], "little")
        self.header, self.data = json.loads(whole[8:length]), whole[length:]

    def write(self, seed: int) -> str:
        """Writes the files for a seed. Returns which of them is odd, and its content."""
        draw = np.random.default_rng(seed)
        which = ("config", "preprocessor", "header")[seed % 3]
        contents = {"config": CONTENT, "preprocessor": PREPROCESSOR, "header": self.header}
        contents[which] = mutated(contents[which], OTHERS[which], draw)
        for name, file in (("config", checkpoint.CONFIG), ("preprocessor", checkpoint.PREPROCESSOR)):
            (self.directory / file).write_text(json.dumps(contents[name]), encoding="utf-8")
        encoded = json.dumps(contents["header"]).encode()
        (self.directory / checkpoint.WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + self.data)
        return f"{which}: {json.dumps(contents[which])[:3000]}"


def refused(ask: Callable[[], object]) -> bool:
    """Tells whether a call is refused with a message."""
    try:
        ask()
    except ReferenceUnavailableError:
        return False
    except InputError:
        return True
    return False


def asked(directory: Path, out: Path, image: Path, seen: set[str]) -> bool:
    """Does all that a command does before it runs the model, and predicts. Returns whether it was refused."""
    if refused(lambda: convert(directory, out, "hf")):
        # Nothing is half-written, and the loader's message says the same.
        assert not out.exists()
        refused(lambda: predict(pretrained.from_pretrained(directory), [image]))
        return refused(lambda: prepare_candidate(None, *reversed(pretrained.open_checkpoint(directory))))
    refused(lambda: pixels_for(pretrained.open_checkpoint(directory)[1], image.parent, 1))
    refused(lambda: predict(pretrained.from_pretrained(directory), [image]))
    source, config = pretrained.open_checkpoint(directory)
    prepare_candidate(None, config, source)
    # FlaxViT is slow, so it runs once a configuration. PyTorch's ViT reacts to most odd fields.
    told = json.dumps(config.hf_numerics())
    names = ("torch",) if told in seen else REFERENCES
    seen.add(told)
    for name in names:
        refused(lambda name=name: reference_for(config, hf_tensors(config, source), name))
    return False


def test_odd_files_are_used_or_refused_in_words(tmp_path: Path) -> None:
    """Uses 200 files, always the same ones, or 2,000 in hypothesis's thorough profile."""
    image_of = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'vit-ref[images]'")
    files, image = Files(tmp_path / "vit"), tmp_path / "images" / "a.png"
    image.parent.mkdir()
    image_of.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(image)
    faults, used, seen = [], 0, set[str]()
    count = 200 * max(1, settings.default.max_examples // 25)
    for seed in range(count):
        what = files.write(seed)
        try:
            with warnings.catch_warnings():
                for noise in NOISE:
                    warnings.filterwarnings("ignore", message=noise)
                used += not asked(files.directory, tmp_path / f"out-{seed}", image, seen)
        except Exception:
            faults.append(f"seed {seed}, {what}\n{''.join(traceback.format_exc()[-1500:])}")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:5])
    # Some are refused and some are used. A test that tries nothing would fail here.
    assert count / 10 < used < count / 1.2
