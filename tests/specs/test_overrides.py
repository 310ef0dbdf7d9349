"""`--set KEY=VALUE`."""

from __future__ import annotations

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs import parse_spec

TEXT = """\
version: 1
passes:
  - cleanup.canonicalize
  - quantize.int8: {targets: ["*", "!*.head"]}
  - cast.dtype
lower: [onnxruntime]
"""


def override(*overrides: str, text: str = TEXT):
    return parse_spec(text, name="spec.yaml", overrides=overrides)


@pytest.mark.parametrize(
    "key", ["passes.1.embeddings", "passes[1].embeddings", "passes.quantize.int8.embeddings"]
)
def test_an_option_is_named_by_index_or_by_id(key):
    spec = override(f"{key}=false")
    assert spec.passes[1].options == {"targets": ["*", "!*.head"], "embeddings": False}


def test_what_is_absent_is_added():
    spec = override(
        "seed=7", "calibration.data=synthetic", "calibration.samples=16",
        "passes.cast.dtype.to=bfloat16", "model.inputs.x={dtype: bool, shape: [n]}",
    )  # fmt: skip
    assert spec.seed == 7
    assert spec.calibration is not None
    assert (spec.calibration.data, spec.calibration.samples) == ("synthetic", 16)
    assert spec.passes[2].options == {"to": "bfloat16"}
    assert spec.model.inputs["x"].shape == ("n",)


def test_list_items_and_whole_entries_are_replaced():
    spec = override("passes.1.targets.1=!kind:embedding", "passes.2=cast.dtype: {to: bfloat16}")
    assert spec.passes[2].options == {"to": "bfloat16"}
    assert spec.passes[1].options["targets"] == ["*", "!kind:embedding"]


def test_later_overrides_win_and_values_are_yaml_1_2():
    spec = override("seed=1", "seed=010", "passes.1.max_error=1e-2")
    assert spec.seed == 10
    assert spec.passes[1].options["max_error"] == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "--set:1:1: seed: expected KEY=VALUE, such as 'seed=1' or 'passes.0.bits=4'"),
        ("=4", "--set:1:1: =4: expected KEY=VALUE, such as 'seed=1' or 'passes.0.bits=4'"),
        ("..=4", "--set:1:1: ..: names nothing; expected KEY=VALUE, such as 'seed=1'"),
        ("sed=4", "--set:1:1: sed: a spec has no section 'sed'; did you mean 'seed'?"),
        ("seed=x", "--set:1:6: seed: expected an integer, got the text 'x'"),
        ("seed=[1", "--set:1:8: seed: not YAML: did not find expected ',' or ']' (while parsing a "
         "flow sequence)"),
        ("passes.9.x=1", "--set:1:1: passes.9.x: passes has no entry 9; the last is 2"),
        ("passes.1.activation=dynamic",
         "--set:1:1: passes[1].activation: quantize.int8 has no option 'activation'; did you mean "
         "'activations'?"),
        ("passes.quantize.in8.x=1",
         "--set:1:1: passes.quantize.in8.x: 'passes' has no entry 'quantize.in8'; did you mean "
         "'quantize.int8'?"),
        ("passes.1.targets.7=a", "--set:1:1: passes.1.targets.7: the list has no entry 7; the last "
         "is 1"),
        ("passes.1.targets.a=a",
         "--set:1:1: passes.1.targets.a: 'a' should be an index into a list"),
        ("version.x=1", "--set:1:1: version.x: 1 has no 'x' below it"),
        ("lower.onnxruntime.x=1",
         "--set:1:1: lower[0].x: onnxruntime has no option 'x'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_said_in_one_line(text, message):
    with pytest.raises(SpecError) as caught:
        override(text)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(message)


def test_an_id_that_stands_twice_must_be_named_by_index():
    twice = TEXT.replace("  - cast.dtype", "  - quantize.int8")
    with pytest.raises(SpecError) as caught:
        override("passes.quantize.int8.embeddings=false", text=twice)
    assert str(caught.value).endswith(
        "quantize.int8 stands in 'passes' 2 times; name one by its index, such as 'passes.1'"
    )


def test_all_wrong_overrides_come_with_the_problems_of_the_file():
    with pytest.raises(SpecError) as caught:
        override("sed=4", "passes.9.x=1", text=TEXT.replace("lower", "lowr"))
    assert len(caught.value.problems) == 3
