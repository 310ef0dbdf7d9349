"""A job whose data is made of the model: once in a run, before the first pass, as a lock says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from models import stripes

import graphwright as gw
from graphwright.ir.errors import ContractError, ModelError, SpecError
from graphwright.job.pipeline import JobSettings, run
from graphwright.passes.cleanup import FoldBatchNorm
from graphwright.specs.spec import load_spec, parse_spec

MADE = "{source: bn_synthesis, samples: 8, batch_size: 4, synthesis: {iterations: 4}}"
SPEC = f"""
version: 1
calibration: {MADE}
training: {MADE.replace("batch_size: 4", "batch_size: 8")}
passes:
  - cleanup.fold_batch_norm
  - quantize.int8: {{activations: static}}
  - tune.finetune: {{tune: {{steps: 1, loss: kl, lr: 1.0e-6}}}}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    stripes.program().save(tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def job(model: Path, text: str, out: str = "out", **settings) -> gw.Program:
    spec = parse_spec(text, folder=model.parent)
    return run(model, spec, JobSettings(model.parent / out, quiet=True, **settings))


def test_data_is_made_once_and_from_the_model_before_the_first_pass(model, monkeypatch):
    from graphwright.ir.synthesis import images

    steps = []
    original = images._Descent._step
    monkeypatch.setattr(
        images._Descent, "_step", lambda self, t: (steps.append(t), original(self, t))[1]
    )
    outcome = job(model, SPEC)
    assert steps == [0, 1, 2, 3]
    assert not (model.parent / ".out.graphwright").exists()
    lock = yaml.safe_load((outcome.folder / "spec.lock.yaml").read_text())
    assert lock["calibration"]["synthesis"]["milestone"] == 1.0
    again = run(model, load_spec(outcome.folder / "spec.lock.yaml"),
                JobSettings(model.parent / "again", quiet=True))  # fmt: skip
    for name, tensor in outcome.program.state.items():
        assert torch.equal(tensor, again.program.state[name])


def test_a_model_whose_norms_are_folded_is_refused_before_anything_runs(tmp_path):
    FoldBatchNorm()(stripes.program()).save(tmp_path / "model.pt2")
    text = f"version: 1\ncalibration: {MADE}\npasses: [{{quantize.int8: {{activations: static}}}}]"
    with pytest.raises(ModelError, match="has folded the batch norms of the model"):
        job(tmp_path / "model.pt2", text)


def test_a_broken_pass_leaves_the_data_with_its_reproducer(model):
    text = f"""
version: 1
calibration: {MADE}
passes:
  - cleanup.fold_batch_norm
  - quantize.int8: {{activations: static, max_error: 1.0e-9}}
"""
    with pytest.raises(ContractError):
        job(model, text)
    folder = model.parent / "out.reproducer"
    spec = load_spec(folder / "spec.yaml")
    assert spec.calibration.source is None
    assert spec.calibration.data == "calibration.safetensors"
    with pytest.raises(ContractError):
        run(folder / "before.pt2", spec, JobSettings(folder / "out", quiet=True))


WRONG = {
    "calibration: {samples: 4}": "'calibration' needs 'data', or 'source: bn_synthesis'",
    "calibration: {data: synthetic, synthesis: {lr: 0.1}}": "synthesis is for 'source: bn_syn",
    "calibration: {source: bn_synthesis, synthesis: {mean: [0.5]}}": "one value each per channel",
    "calibration: {source: bn_syntesis}": "did you mean 'bn_synthesis'",
    "calibration: {source: domain_shift}": "domain_shift needs 'data'",
    "calibration: {data: synthetic, filter: agreement}": "filter is for images that are made",
    "calibration: {data: synthetic, threshold: 0.5}": "threshold is for 'filter: agreement'",
    "calibration: {source: bn_synthesis, filter: bidirectional}": "bidirectional needs 'data'",
    "calibration: {source: domain_shift, data: synthetic, filter: metropolis_hastings}": (
        "metropolis_hastings is for 'source: bn_synthesis'"
    ),
    "calibration: {source: domain_shift, data: synthetic, shift: {black: 2.0}}": "black 2 is not",
    "evaluate: {source: bn_synthesis, data: synthetic}": "'evaluate' has no key 'source'",
    "evaluate: {data: synthetic, steps: 3}": "evaluate.steps: steps are for `agreement`",
}


@pytest.mark.parametrize("section", WRONG)
def test_wrong_sections_are_refused_by_the_spec(section):
    with pytest.raises(SpecError) as error:
        parse_spec(f"version: 1\n{section}\npasses: [cleanup.fold_batch_norm]\n")
    assert WRONG[section] in str(error.value)
