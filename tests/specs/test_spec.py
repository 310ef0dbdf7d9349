"""The typed spec, ready-made specs, and the lock file."""

from __future__ import annotations

import dataclasses
import os

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs import load_spec, parse_spec, ready_made_specs, resolve, write_lock

FULL = """\
version: 1
model:
  factory: package.module:build
  kwargs: {width: 8, names: [a, b]}
  inputs:
    ids: {dtype: int64, shape: [batch, 16], example: [4, 16], range: [0, 100]}
calibration: {data: synthetic, samples: 12}
evaluate: {data: "package.module:held_out", metric: "package.module:score"}
require: {max_drop: 0.002, min_speedup: 1.2}
seed: 3
passes:
  - cleanup.canonicalize
  - quantize.int8: {activations: static}
  - cast.dtype:
lower:
  - onnxruntime
"""


def test_a_spec_is_typed():
    spec = parse_spec(FULL)
    assert spec.model.factory == "package.module:build"
    assert spec.model.kwargs == {"width": 8, "names": ["a", "b"]}
    tensor = spec.model.inputs["ids"]
    assert (tensor.dtype, tensor.shape, tensor.example) == ("int64", ("batch", 16), (4, 16))
    assert tensor.range == (0.0, 100.0)
    assert spec.calibration is not None
    assert (spec.calibration.samples, spec.calibration.batch_size) == (12, 8)
    assert spec.evaluate is not None
    assert spec.evaluate.metric == "package.module:score"
    assert (spec.require.max_drop, spec.require.max_minutes) == (0.002, None)
    assert [(call.id, call.options, call.line) for call in spec.passes] == [
        ("cleanup.canonicalize", {}, 12),
        ("quantize.int8", {"activations": "static"}, 13),
        ("cast.dtype", {}, 14),
    ]
    assert [call.id for call in spec.lower] == ["onnxruntime"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.seed = 4  # type: ignore[misc]


def test_a_later_problem_is_placed_in_the_file():
    spec = parse_spec(FULL, name="a.yaml")
    path = ("passes", 1, "quantize.int8", "activations")
    problem = spec.problem(path, "too fast", "slow")
    assert str(problem) == "a.yaml:13:34: passes[1].activations: too fast; did you mean 'slow'?"


def test_ready_made_specs_are_valid_and_say_what_they_do():
    names = ready_made_specs()
    assert {"fp32", "int8", "int8_static", "fp16", "triton"} <= set(names)
    for name, about in names.items():
        spec = load_spec(name)
        assert spec.lower
        assert spec.passes
        assert len(about) > 20


def test_a_misspelt_ready_made_spec_and_a_misspelt_file(tmp_path, monkeypatch):
    with pytest.raises(SpecError) as caught:
        load_spec("itn8")
    assert "neither a file nor a ready-made spec; ready-made are fp16, fp32" in str(caught.value)
    assert caught.value.problems[0].suggestion == "int8"
    (tmp_path / "spec.yaml").write_text(FULL)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spce.yaml")
    assert caught.value.problems[0].suggestion == str(tmp_path / "spec.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_spec("spec.yaml").seed == 3


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "no/such/folder/spec.yaml", "."])
def test_a_name_that_is_no_file(name):
    with pytest.raises(SpecError) as caught:
        load_spec(name)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("section", ["calibration", "training", "evaluate"])
def test_data_that_does_not_exist_is_refused(tmp_path, problems, section):
    (tmp_path / "samples.npz").write_bytes(b"")
    text = f"version: 1\nlower: [triton]\n{section}: {{data: sampels.npz}}\n"
    assert problems(text, folder=tmp_path) == [
        f"spec.yaml:3:{10 + len(section)}: {section}.data: no file or folder 'sampels.npz' in "
        f"{tmp_path.name!r}; did you mean 'samples.npz'?"
    ]
    assert problems(text, folder=tmp_path, check_files=False) == []
    assert problems(text.replace("sampels", "samples"), folder=tmp_path) == []
    (only,) = problems(text.replace("sampels.npz", "synthetc"), folder=tmp_path)
    assert only.endswith("did you mean 'synthetic'?")


def test_the_resolved_spec_has_every_default():
    document = resolve(parse_spec(FULL))
    options = document["passes"][1]["quantize.int8"]
    assert options["activations"] == "static"
    assert options["targets"] == ["*"]
    assert "max_error" not in options  # no bound
    assert document["evaluate"]["batch_size"] == 8


def test_a_lock_reads_back_as_the_same_spec(tmp_path):
    spec = parse_spec(FULL)
    facts = {"versions": {"torch": "2.13.0", "note": "1e-4"}, "threads": 2, "sha256": "0" * 64}
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    write_lock(spec, facts, first)
    write_lock(spec, dict(reversed(facts.items())), second)
    assert first.read_bytes() == second.read_bytes()
    again = load_spec(first)
    assert resolve(again) == resolve(spec)
    assert again.lock is not None
    assert again.lock.model_dump()["versions"] == facts["versions"]
    write_lock(again, facts, second)
    assert first.read_bytes() == second.read_bytes()


def test_a_lock_keeps_the_meaning_of_relative_paths(tmp_path):
    source, out, work = tmp_path / "job", tmp_path / "out" / "x", tmp_path / "work"
    for folder in (source, out, work):
        folder.mkdir(parents=True)
    (source / "data.npz").write_bytes(b"")
    (source / "spec.yaml").write_text(
        "version: 1\nlower: [triton]\ncalibration: {data: data.npz}\n"
    )
    write_lock(load_spec(source / "spec.yaml"), {}, work / "spec.lock.yaml", home=out)
    os.rename(work / "spec.lock.yaml", out / "spec.lock.yaml")
    again = load_spec(out / "spec.lock.yaml")
    assert again.folder.resolve() == source.resolve()
    assert again.calibration is not None
    assert again.calibration.data == "data.npz"


def test_options_inside_options_are_filled_in_and_read_again(tmp_path):
    text = (
        "version: 1\ntraining: {data: synthetic, batch_size: 4}\n"
        "passes:\n  - tune.finetune: {tune: {steps: 7, betas: [0.5, 0.9]}}\n"
    )
    spec = parse_spec(text)
    assert spec.training is not None
    assert (spec.training.data, spec.training.batch_size) == ("synthetic", 4)
    (entry,) = resolve(spec)["passes"]
    filled = entry["tune.finetune"]["tune"]
    assert (filled["steps"], filled["betas"], filled["optimizer"]) == (7, [0.5, 0.9], "adamw")
    write_lock(spec, {}, tmp_path / "spec.lock.yaml")
    again = load_spec(tmp_path / "spec.lock.yaml")
    assert again.training == spec.training
    assert resolve(again)["passes"] == resolve(spec)["passes"]


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ("{stpes: 7}",
         "28: passes[0].tune.stpes: 'passes[0].tune' has no key 'stpes'; did you mean 'steps'?"),
        ("{optimizer: adamww}",
         "39: passes[0].tune.optimizer: expected one of sgd, adam, adamw, mfac, adagrad, "
         "adagrad_norm, got 'adamww'; did you mean 'adamw'?"),
        ("{loss: mine}",
         "34: passes[0].tune.loss: expected one of cross_entropy, next_token, mse, kl, "
         "teacher_mse or module:function, got 'mine'"),
        ("{lr: 0}",
         "32: passes[0].tune.lr: expected more than 0, got 0 (Learning rate after the warm-up, "
         "before it decays)"),
    ],
)  # fmt: skip
def test_slips_inside_options_are_found(problems, tune, said):
    head = "version: 1\ntraining: {data: synthetic}\npasses:\n"
    text = f"{head}  - tune.finetune: {{tune: {tune}}}\n"
    assert problems(text) == [f"spec.yaml:4:{said}"]
