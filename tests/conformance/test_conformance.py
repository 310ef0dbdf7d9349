"""A dozen architectures, one or two of each kind, through the whole compiler.

All of them go through `make conformance`, which writes docs/conformance.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conformance import zoo
from conformance.judge import STAGES, Row, judge
from conformance.table import render

ROOT = Path(__file__).parents[2]
REPRESENTATIVE = (
    "unet",  # transposed convolutions, skips, resizing
    "lstm_classifier",  # recurrent layers with a free length
    "resnet",  # batch norm, free image size
    "convnext",
    "vit",
    "bert",
    "llama",  # grouped-query attention, rotary embeddings
    "gemma_tied",  # tied embeddings, RMS norm
    "mixtral",  # mixture of experts
    "t5",  # relative positions, two sequences
    "clip_text",
    "patchtst",
    "dit",  # diffusion transformer
)


LIMITS = {"clip_text": ("dimension 'seq' is 1 to 32",)}
"""Limits of the model itself that tracing tells: CLIP's text model refuses more positions."""


# transformers and diffusers warn about their own affairs (deprecations, missing packages).
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_stage_computes_what_the_model_computes(name: str) -> None:
    row = judge(zoo.load()[name])
    assert row.stages == dict.fromkeys(STAGES, "ok")
    assert len(row.notes) == len(LIMITS.get(name, ()))
    for note, limit in zip(row.notes, LIMITS.get(name, ()), strict=True):
        assert limit in note


def test_the_zoo_is_wide() -> None:
    architectures = zoo.load().values()
    assert len(architectures) >= 45
    assert len({a.family for a in architectures}) >= 12
    for architecture in architectures:
        assert dict(architecture.checks[0]).get("batch") == 1 or "batch" in architecture.fixed
        assert len(architecture.checks) >= 2


def test_the_table_in_the_docs_lists_the_zoo() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text()
    listed = re.findall(r"^\| (\w+) \|", text, flags=re.MULTILINE)
    assert listed[1:] == list(zoo.load()), "run `make conformance`"


def test_a_failed_stage_shows_in_the_table_with_its_reason() -> None:
    good = Row("net", "cnn", dict.fromkeys(STAGES, "ok"), 2e-7)
    bad = Row("odd", "cnn", {"trace": "ok", "cleanup": "/some/where/file.py:3: no | way"}, 1e-6)
    page = render([good.as_json(), bad.as_json()])
    assert "2 architectures, 1 of them pass every stage" in page
    assert "| net | cnn | ok | ok | ok | ok | ok | 2e-07 |" in page
    assert "| odd | cnn | ok | **failed** |  |  |  | 1e-06 |" in page
    assert "- **odd**: cleanup: file.py:3: no \\| way" in page
