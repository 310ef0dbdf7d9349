"""An encoder-decoder from a folder to one folder with two artifacts and one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models.seq2seq import model, sources

import graphwright as gw
from graphwright.backends.parts import CompiledParts
from graphwright.ir.errors import ArgumentError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*generation.*")

SPEC = """
version: 1
calibration: {data: synthetic, samples: 4}
passes:
  - quantize.rtn: {bits: 8, block: 16, targets: ["encoder.*", "decoder.block.*.layer.2.*"]}
  - quantize.gptq: {bits: 4, block: 16, targets: ["decoder.block.*.layer.0.*"]}
lower: [onnxruntime]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("t5")
    model("t5").save_pretrained(place)
    return place


def spec(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def outcome(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("run")
    return gw.optimize(folder, spec(place, SPEC), out=place / "out")


def test_one_folder_and_one_report_of_two_parts(outcome: Any) -> None:
    report = json.loads((outcome.folder / "report.json").read_text())
    paths = [row["path"] for row in report["result"]["artifacts"]]
    assert paths == ["encoder/model.onnx", "decoder/model.onnx"]
    assert all((outcome.folder / path).is_file() for path in paths)
    assert set(paths) | {"parts.json"} <= set(report["files"])
    rows = [(row["part"], row["id"], bool(row["skipped"])) for row in report["passes"]]
    assert rows == [
        ("encoder", "quantize.rtn", False),
        ("encoder", "quantize.gptq", True),
        ("decoder", "quantize.rtn", False),
        ("decoder", "quantize.gptq", False),
    ]
    sizes = report["parts"]
    assert report["model"]["parameters"] == sum(row["parameters"] for row in sizes.values())
    assert all(row["weight_bytes_after"] < row["weight_bytes"] for row in sizes.values())
    changed = {
        row["part"]: {a[0] for a in row["actions"] if a[3]} for row in report["passes"][:3:2]
    }
    assert all(name.startswith("encoder.") for name in changed["encoder"])
    assert all(".layer.2." in name for name in changed["decoder"])


def test_what_was_saved_generates(outcome: Any) -> None:
    opened = gw.load(outcome.folder)
    assert isinstance(opened, CompiledParts)
    ids, mask = sources("t5")
    options: dict[str, Any] = {"max_new_tokens": 5, "no_repeat_ngram_size": 1}
    found = opened.generate(ids, **mask, **options)
    again = gw.ir.generation.encoder_decoder.EncoderDecoder.of(outcome.program)  # type: ignore[attr-defined]
    assert [c.ids for c in found] == [c.ids for c in again.generate(ids, **mask, **options)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("passes: [{quantize.rtn: {targets: [decoder.blok.*]}}]", ModelError, "matches no layer"),
        ("lower: [triton]\nevaluate: {data: synthetic}", ArgumentError, "compiled as 2 programs"),
    ],
)
def test_what_no_part_can_do_is_refused(
    folder: Path, tmp_path: Path, text: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        gw.optimize(folder, spec(tmp_path, f"version: 1\n{text}\n"), out=tmp_path / "out")
