"""Tests of reports as JSON, and as files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.helpers.synthetic_reports import ORIGIN, REPORTS, measured, parity, ported, wrong
from vit_ref.errors import InputError
from vit_ref.verify.report import SCHEMA, summary, to_html, to_json, write

SCHEMA_OF_REPORTS = json.loads(SCHEMA.read_text(encoding="utf-8"))
each_report = pytest.mark.parametrize("name", REPORTS)


@each_report
def test_every_report_is_valid_by_the_schema(name) -> None:
    jsonschema.Draft202012Validator(SCHEMA_OF_REPORTS).validate(to_json(REPORTS[name]()))


def test_the_schema_describes_every_field_and_allows_no_other() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA_OF_REPORTS)
    objects, bare = 0, []

    def walk(node: Any, path: str) -> None:
        nonlocal objects
        if isinstance(node, dict):
            if "properties" in node:
                objects += 1
                bare.extend(f"{path}/{key}" for key, field in node["properties"].items() if not field["description"])
                if node["additionalProperties"] is not False or node["required"] != list(node["properties"]):
                    bare.append(path)
            for key, value in node.items():
                walk(value, f"{path}/{key}")
        elif isinstance(node, list):
            for k, value in enumerate(node):
                walk(value, f"{path}/{k}")

    walk(SCHEMA_OF_REPORTS, "")
    assert not bare
    assert objects == 13


@each_report
def test_the_document_is_strict_json_with_every_check_once(name) -> None:
    report = REPORTS[name]()
    document = to_json(report)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    sections = [document[part] for part in ("forward", "backward") if document[part]]
    statuses = {check["name"]: check["status"] for section in sections for check in section["checks"]}
    statuses |= {f"behaviour/{each['name']}": each["status"] for each in document["behaviour"]}
    if not document["backward"]:
        statuses["backward/pixels"] = "not observed"
    assert statuses == {check.name: check.status for check in report.checks}
    assert sum(document["counts"].values()) == len(report.checks)
    assert document["passed"] is report.passed


@pytest.mark.parametrize(("value", "written"), [(math.inf, "Infinity"), (-math.inf, "-Infinity"), (math.nan, "NaN")])
def test_a_number_not_finite_is_a_word_that_float_reads(value, written) -> None:
    rounding = to_json(ported(parity(measured("logits", rounding=value))))["forward"]["checks"][0]["measured"][
        "rounding"
    ]
    assert rounding == written
    assert str(float(rounding)) == str(value)


def test_a_document_holds_the_measured_numbers() -> None:
    result = measured("block.3.norm1", 3e-5, 2e-6, rounding=3.25e-5, reference_error=1e-7, gate=3e-7)
    assert to_json(ported(parity(result)))["forward"]["checks"] == [
        {
            "name": "forward/block.3.norm1",
            "site": "block.3.norm1",
            "kind": "site",
            "block": 3,
            "status": "failed",
            "reason": "float64 relative RMS error 3.0e-05, gate 1e-12",
            "measured": {
                "exact": {"rms": 3e-5, "max": 9e-5},
                "alone": {"rms": 2e-6, "max": 4e-6},
                "oracles": {"rms": 1.5e-16, "max": 2.5e-16},
                "rounding": 3.25e-5,
                "reference_error": 1e-7,
                "gate": 3e-7,
                "ratio": pytest.approx(325, rel=1e-12),  # a quotient of two rounded numbers
                "margin": pytest.approx(3e-7 / 3.25e-5, rel=1e-12),
                "incomparable": "",
                "failure": "float64 relative RMS error 3.0e-05, gate 1e-12",
                "semantic_gate": 1e-12,
                "passes_semantic_gate": False,
                "passes_numerical_gate": False,
            },
        }
    ]


def test_sites_not_shown_keep_their_position() -> None:
    checks = to_json(ported(parity(measured("logits"), unmapped=("b", "a"), order=("a", "b", "logits"))))["forward"]
    assert [check["site"] for check in checks["checks"]] == ["a", "b", "logits"]
    assert [check["measured"] is None for check in checks["checks"]] == [True, True, False]


def test_gradients_have_a_kind_and_no_second_oracle() -> None:
    checks = to_json(wrong())["backward"]["checks"]
    kinds = {check["site"]: (check["kind"], check["block"]) for check in checks}
    assert kinds["block.1.norm1"] == ("site", 1)
    assert kinds["norm"] == ("site", None)
    assert kinds["blocks.1.norm1.scale"] == ("parameter", 1)
    assert kinds["norm.scale"] == ("parameter", None)
    assert kinds["pixels"] == ("pixels", None)
    assert {check["measured"]["oracles"] for check in checks} == {None}


@pytest.mark.parametrize(
    ("name", "divergence", "alone_in", "parts"),
    [
        ("right", None, "float32", []),
        ("wrong", "block.0.norm1", "float64", ["block.0", "block.1", "norm"]),
        ("rounding", "norm", "float32", ["norm"]),
    ],
)
def test_the_first_divergence_and_the_parts_wrong_by_themselves(name, divergence, alone_in, parts) -> None:
    section = to_json(REPORTS[name]())["forward"]
    assert section["first_divergence"] == divergence
    assert section["alone_precision"] == alone_in
    assert [each["part"] for each in section["wrong_alone"]] == parts


def test_a_check_that_two_patterns_mean_counts_for_the_first() -> None:
    report = ported(
        parity(measured("block.0.norm1", 1e-6), measured("block.0.norm2"), measured("logits")),
        expected_failed_checks={"block.0.norm1": "one", "block.*": "two"},
    )
    outcomes = [(each["pattern"], each["failed"], each["stale"]) for each in to_json(report)["expected_failed_checks"]]
    assert outcomes == [("block.0.norm1", 1, 0), ("block.*", 0, 1)]


def test_a_file_is_written_whole_and_nothing_else_with_it(tmp_path) -> None:
    path = tmp_path / "report.html"
    write(path, "first")
    write(path, "second ✓ \udcff")
    assert path.read_text(encoding="utf-8") == "second ✓ \\udcff"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_file_is_named_and_keeps_its_content(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept").touch()
    for path in (tmp_path / "missing" / "report.html", tmp_path / "taken"):
        with pytest.raises(InputError, match=f"^{path}: it cannot be written .*: give another place") as raised:
            write(path, "text")
        assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "taken", tmp_path / "taken" / "kept"]


def test_a_link_or_pipe_is_written_to_and_not_replaced(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as stream:
            stream.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@each_report
def test_every_report_names_the_bytes_that_were_judged(name: str) -> None:
    """The text, the JSON and the page name the digest of the weights and the commit on the hub."""
    report = REPORTS[name]()
    assert to_json(report)["checkpoint"] == ORIGIN._asdict()
    for text in (" ".join(summary(report).split()), to_html(report)):
        assert ORIGIN.sha256 in text and ORIGIN.revision in text
    local = dataclasses.replace(report, checkpoint=ORIGIN._replace(revision=None))
    jsonschema.Draft202012Validator(SCHEMA_OF_REPORTS).validate(to_json(local))
    assert "commit" not in summary(local) and "revision" not in to_html(local)


def test_a_document_says_what_of_the_checkpoint_was_checked() -> None:
    assert to_json(REPORTS["right"]())["cut"] is None
    cut = {"blocks": [0, 11], "grid": [4, 4], "image_size": [56, 56], "tensors": 40}
    assert json.loads(json.dumps(to_json(REPORTS["a cut"]())))["cut"] == cut


def test_the_schema_names_both_commands_and_their_functions() -> None:
    said = SCHEMA_OF_REPORTS["description"]
    assert all(name in said for name in ("vit-ref verify", "vit-ref compare", "check_port", "vit_ref.compare"))
