"""Rules between options: found with the spec, at the option, and kept by the passes themselves."""

from __future__ import annotations

import json

import pytest

from graphwright.backends.base import find_backend
from graphwright.ir.errors import ArgumentError
from graphwright.passes.registry import find_pass, pass_ids
from graphwright.specs.schema import shipped_schema

DATA = "calibration: {data: synthetic}\ntraining: {data: synthetic}\n"

SCHEMA = shipped_schema()
ONE_OF = ("adapt.degradation_lora", "resize.assemble")
"""Passes that need one of several options."""
BARE = [
    name
    for name in pass_ids()
    if not SCHEMA.definitions[name].get("required") and name not in ONE_OF
]

REFUSED = [
    ("quantize.gptq", {"act_order": True}, "act_order", "act_order takes static_groups: true"),
    ("quantize.vptq", {"residual_centroids": 1}, "residual_centroids", "0 for none, or at least 2"),
    ("quantize.adaquant", {"method": "nelder_mead", "lr": 1e-3}, "lr",
     "lr has no part in method nelder_mead"),
    ("prune.otov2", {"method": "dhspg", "pruning_periods": 2}, "pruning_periods",
     "pruning_periods has no part in method dhspg"),
    ("prune.otov2", {"tune": {"patience": 2}}, "tune", "patience could end the training"),
    ("prune.otov2", {"pruning_steps": 2, "pruning_periods": 3}, "pruning_steps",
     "2 pruning_steps cannot be cut into 3 pruning_periods"),
    ("prune.mfac", {"pattern": "1x3"}, "", "block_size 128 is no multiple"),
    ("prune.issp", {"pattern": [1, 2], "sparsity": 0.5}, "sparsity",
     "sparsity or pattern, not both"),
    ("prune.issp", {"allow_adjust": True}, "allow_adjust", "allow_adjust belongs to pattern"),
    ("prune.issp", {"pattern": [2, 2]}, "pattern", "pattern 2:2 prunes"),
    ("prune.udfc", {"merge_balance": 0.5}, "merge_balance", "no part in repair auto"),
    ("prune.udfc", {"repair": "merge", "offsets": 0.5}, "offsets", "no part in repair merge"),
    ("quantize.udfc", {"repair": "features", "offsets": 0.5}, "offsets",
     "no part in repair features"),
    ("prune.nm", {"n": 4}, "n", "n = 4 keeps all of m = 4"),
    ("prune.nm", {"pull": 0.1}, "pull", "pull has no part in method mask_decay"),
    ("prune.nm", {"method": "combined", "patterns": [[1, 2]]}, "patterns",
     "patterns belong to structure custom"),
    ("prune.nm", {"dense": 0.9}, "dense", "leave no step for the schedule"),
    ("prune.gradual", {"initial": 0.9, "sparsity": 0.5}, "initial",
     "0.9 is not below sparsity 0.5"),
    ("prune.wanda", {"pattern": "4:4"}, "pattern", "4:4 prunes nothing"),
    ("prune.wanda", {"pattern": "2:4", "sparsity": 0.4}, "sparsity", "a sparsity of its own"),
    ("prune.magnitude", {"pattern": "2:4", "scope": "row"}, "scope", "compares within its groups"),
    ("prune.magnitude", {"scope": "global", "distribution": "erk"}, "scope",
     "leave out distribution erk"),
    ("prune.magnitude", {"pattern": "2:4", "distribution": "erk"}, "distribution",
     "takes no distribution"),
    ("prune.magnitude", {"spread": 0.2}, "spread", "no part in distribution uniform"),
    ("prune.dsnot", {"base": "existing", "sparsity": 0.5}, "base", "the mask is there already"),
    ("prune.dsnot", {"base": "wanda", "update": True}, "update", "only the base sparsegpt"),
    ("quantize.bit_allocation", {"measure": "latency"}, "measure", "no `table` is given"),
    ("quantize.bit_allocation", {"quantizer": "quantize.bit_allocation"}, "quantizer",
     "cannot quantize by itself"),
    ("quantize.bit_allocation", {"quantizer": "quantize.gpt"}, "quantizer", "no pass named"),
    ("quantize.bit_allocation", {"quantizer": "prune.zig"}, "quantizer", "has no options `bits`"),
    ("quantize.bit_allocation", {"quantizer": "quantize.rtn", "activations": True}, "activations",
     "quantizes no inputs"),
]  # fmt: skip


TUNE_REFUSED = [
    ({"schedule": "multistep"}, "", "milestones belong to schedule multistep"),
    ({"milestones": [0.5]}, "milestones", "milestones belong to schedule multistep"),
    ({"schedule": "multistep", "milestones": [0.5, 0.2]}, "milestones", "milestones have to rise"),
    ({"schedule": "multistep", "milestones": [0.5, 0.5]}, "milestones", "milestones have to rise"),
    ({"schedule": "step"}, "", "step_share belongs to schedule step"),
    ({"schedule": "linear", "gamma": 0.5}, "gamma", "gamma has no part in schedule linear"),
    ({"min_lr": 0.5, "lr": 0.25}, "min_lr", "min_lr 0.5 is more than lr 0.25"),
    ({"loss": "mse", "label_smoothing": 0.1}, "label_smoothing", "no part in loss mse"),
    ({"select": "accuracy"}, "select", "set hold_out to a share of the samples"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["tune.finetune", "prune.issp", "prune.gradual"])
@pytest.mark.parametrize(("tune", "at", "said"), TUNE_REFUSED)
def test_rules_of_training_are_asked_inside_every_pass(name, tune, at, said, problems):
    text = f"version: 1\n{DATA}passes:\n  - {name}: {{tune: {json.dumps(tune)}}}\n"
    found = problems(text)
    assert len(found) == 1, found
    assert said in found[0]
    assert f".tune.{at}: " in found[0] if at else ".tune: " in found[0]
    with pytest.raises(ArgumentError) as caught:
        find_pass(name)(tune=tune)
    assert said in str(caught.value)


def test_what_a_pass_sets_for_its_training_counts_in_the_rules(problems):
    """PV-Tuning's own schedule is constant: with `lr` alone nothing is wrong, with gamma it is."""
    text = f"version: 1\n{DATA}passes:\n  - quantize.rtn\n  - quantize.pv: {{tune: %s}}\n"
    assert not problems(text % "{lr: 1.0e-4}")
    assert "gamma has no part in schedule constant" in problems(text % "{gamma: 0.5}")[0]


@pytest.mark.parametrize(("name", "options", "at", "said"), REFUSED)
def test_what_does_not_go_together_is_refused_by_spec_and_pass(name, options, at, said, problems):
    text = f"version: 1\n{DATA}passes:\n  - {name}: {json.dumps(options)}\nlower: []\n"
    found = problems(text)
    assert len(found) == 1, found
    assert said in found[0]
    column = 5 if not at else text.splitlines()[4].index(f'"{at}": ') + len(f'"{at}": ') + 1
    assert found[0].startswith(f"spec.yaml:5:{column}: passes[0]")
    with pytest.raises(ArgumentError) as caught:
        find_pass(name)(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quantize.gptq", {"act_order": True, "static_groups": True}),
        ("quantize.adaquant", {"method": "nelder_mead", "lr": 1e-5}),  # the default
        ("prune.mfac", {"pattern": "1x3", "block_size": None}),
        ("prune.nm", {"method": "structure_decay", "structure": "custom",
                      "patterns": [[3, 4], [2, 4]]}),
        ("prune.issp", {"pattern": [1, 2], "allow_adjust": True}),
        ("prune.wanda", {"pattern": "1:4", "sparsity": 0.75}),
        ("prune.magnitude", {"scope": "row", "distribution": "erk"}),
        ("prune.udfc", {"repair": "merge", "merge_balance": 0.5}),
        ("quantize.bit_allocation", {"quantizer": "quantize.rtn", "options": {"block": 32}}),
    ],
)  # fmt: skip
def test_what_goes_together_passes(name, options, problems):
    line = f"  - {name}: {json.dumps(options)}\n"
    assert problems(f"version: 1\n{DATA}passes:\n{line}lower: []\n") == []
    assert find_pass(name)(**options).id == name


def test_a_rule_of_a_backend(problems):
    text = "version: 1\npasses: []\nlower:\n  - onnxruntime: {weights: qdq, opset: 19}\n"
    assert problems(text) == [
        "spec.yaml:4:28: lower[0].weights: weights: qdq needs opset 21 or later, for blocks in "
        "DequantizeLinear; the opset is 19"
    ]
    with pytest.raises(ArgumentError, match="needs opset 21"):
        find_backend("onnxruntime")(weights="qdq", opset=19)


@pytest.mark.parametrize("name", BARE)
def test_defaults_keep_every_rule(name, problems):
    found = problems(f"version: 1\n{DATA}passes:\n  - {name}\nlower: []\n")
    assert [line for line in found if "has nothing to do without" not in line] == []
    assert find_pass(name)().id == name


@pytest.mark.parametrize("name", ONE_OF)
def test_one_of_several_options_is_asked_for(name, problems):
    """By the check, and by the pass."""
    (found,) = problems(f"version: 1\n{DATA}passes:\n  - {name}\nlower: []\n")
    assert "passes[0]: give " in found
    with pytest.raises(ArgumentError, match="give "):
        find_pass(name)()
