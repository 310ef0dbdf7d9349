"""Code that a spec names is found without running it, and refused at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs.code import named_code, refuse_code
from graphwright.specs.spec import parse_spec

WITH_CODE = """version: 1
model: {factory: "nets:build"}
calibration: {data: "nets:batches"}
training: {data: "nets:samples"}
evaluate: {data: "nets:held_out", metric: "nets:score"}
passes:
  - tune.finetune: {tune: {loss: "nets:loss"}}
  - prune.otov2: {tune: {loss: "losses.own:loss"}}
lower: []
"""


def test_every_place_is_found() -> None:
    assert [
        (".".join(map(str, path)), name) for path, name in named_code(parse_spec(WITH_CODE))
    ] == [
        ("model.factory", "nets:build"),
        ("calibration.data", "nets:batches"),
        ("training.data", "nets:samples"),
        ("evaluate.data", "nets:held_out"),
        ("evaluate.metric", "nets:score"),
        ("passes.0.tune.finetune.tune.loss", "nets:loss"),
        ("passes.1.prune.otov2.tune.loss", "losses.own:loss"),
    ]


def test_refused_with_line_and_column() -> None:
    with pytest.raises(SpecError) as caught:
        refuse_code(parse_spec(WITH_CODE, name="spec.yaml"))
    assert caught.value.exit_code == 2
    assert [(p.line, p.path) for p in caught.value.problems][:2] == [
        (2, "model.factory"), (3, "calibration.data"),
    ]  # fmt: skip
    assert len(caught.value.problems) == 7
    assert "--no-code" in str(caught.value)


def test_data_in_files_and_built_in_names_are_no_code(tmp_path: Path) -> None:
    (tmp_path / "a:b").write_text("")
    spec = parse_spec(
        'version: 1\ntraining: {data: "a:b"}\nevaluate: {data: synthetic, metric: cosine}\n'
        "passes:\n  - tune.finetune: {tune: {loss: mse}}\nlower: []\n",
        folder=tmp_path,
        check_files=False,
    )
    assert list(named_code(spec)) == []
    refuse_code(spec)
