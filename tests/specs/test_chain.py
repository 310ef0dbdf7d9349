"""Orders that are refused before a model is opened, with both places and the way out."""

from __future__ import annotations

import pytest

from graphwright.ir.errors import SpecError
from graphwright.specs.check import check_document
from graphwright.specs.load import read_text
from graphwright.specs.schema import Schema, shipped_schema
from graphwright.specs.spec import parse_spec


def schema_with(**facts) -> Schema:
    """The shipped schema plus passes of a family `t` with these facts."""
    document = dict(shipped_schema().document)
    document["$defs"] = dict(document["$defs"])
    for name, own in facts.items():
        own = {
            "contract": "lossy",
            "needs": "nothing",
            "lowers_to": ["onnxruntime", "triton"],
        } | own
        document["$defs"][f"t.{name}"] = {
            "type": "object", "properties": {}, "additionalProperties": False, "description": "",
            "x-graphwright": {"pass": f"t.{name}", **own},
        }  # fmt: skip
    from graphwright.specs.generate import chain_items

    properties = dict(document["properties"])
    properties["passes"] = {**properties["passes"], "items": chain_items(document["$defs"], "pass")}
    return Schema({**document, "properties": properties})


def check(chain: list[str], lower: str = "triton", **facts) -> list[str]:
    text = "version: 1\npasses:\n" + "".join(f"  - {p}\n" for p in chain) + f"lower: [{lower}]\n"
    root, _ = read_text(text, "spec.yaml")
    problems, _ = check_document(root, schema_with(**facts))
    return [str(problem) for problem in problems]


def test_a_pass_after_one_that_must_come_last():
    facts = {"a": {"after": ["t.b", "cleanup.*"]}, "b": {}}
    assert check(["t.b", "cleanup.canonicalize", "t.a"], **facts) == []
    assert check(["t.a", "t.b"], **facts) == [
        "spec.yaml:4:5: passes[1]: t.b must come before t.a (passes[0], line 3); move it up to "
        "line 3"
    ]
    assert check(["t.b", "t.a", "cleanup.canonicalize"], **facts) == [
        "spec.yaml:5:5: passes[2]: cleanup.canonicalize must come before t.a (passes[1], line 4); "
        "move it up to line 4"
    ]


def test_a_pass_behind_one_that_it_must_precede():
    facts = {"a": {"before": ["t.b"]}, "b": {}}
    assert check(["t.a", "t.b", "t.b"], **facts) == []
    assert check(["t.b", "t.b", "t.a"], **facts) == [
        "spec.yaml:5:5: passes[2]: t.a must come before t.b (passes[0], line 3); move it up to "
        "line 3"
    ]


def test_where_two_passes_disagree_a_name_outweighs_a_family():
    facts = {"a": {"before": ["t.*"]}, "b": {"before": ["t.a"]}}
    assert check(["t.b", "t.a"], **facts) == []
    assert check(["t.a", "t.b"], **facts) == [
        "spec.yaml:4:5: passes[1]: t.b must come before t.a (passes[0], line 3); move it up to "
        "line 3"
    ]


@pytest.mark.parametrize("chain", [["t.a", "t.b"], ["t.b", "t.a"]])
def test_where_two_families_disagree_the_order_is_free(chain):
    assert check(chain, a={"after": ["t.*"]}, b={"after": ["t.*"]}) == []


@pytest.mark.parametrize(
    "chain",
    [
        ["quantize.rtn", "compensate.eora", "quantize.pv"],
        ["quantize.rtn", "quantize.pv", "compensate.eora"],
        ["prune.udfc", "cleanup.fold_batch_norm", "quantize.int8"],
        ["quantize.udfc", "cleanup.fold_batch_norm"],
        ["prune.otov2", "cleanup.fold_batch_norm", "quantize.int8"],
        ["cleanup.fold_batch_norm", "prune.zig", "tune.finetune", "quantize.int8"],
    ],
)
def test_chains_that_their_passes_ask_for(chain, problems):
    data = "calibration: {data: synthetic}\ntraining: {data: synthetic}\n"
    text = "".join(f"  - {name}\n" for name in chain)
    found = problems(f"version: 1\n{data}passes:\n{text}lower: []\n")
    assert not [line for line in found if "come before" in line]


def test_a_pass_without_any_that_gives_it_work():
    facts = {"a": {"behind": ["t.*", "!t.c", "t.c[bits]"]}, "b": {}, "c": {}}
    assert check(["t.b", "t.a"], **facts) == []
    for chain in (["t.a"], ["t.c", "t.a"], ["t.a", "t.b"]):
        (only,) = check(chain, **facts)
        assert only.endswith("t.a has nothing to do without one of these in front of it: t.*, "
                             "t.c[bits]")  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("quantize.rtn", "quantize.gptq", True),
        ("quantize.rtn: {targets: ['kind:embedding']}", "quantize.gptq", False),
        ("quantize.rtn: {targets: [head]}", "quantize.gptq: {targets: [head]}", True),
        ("quantize.adaquant", "quantize.rtn", False),  # embeddings are left
        ("quantize.adaquant", "quantize.vptq", True),
        ("quantize.vptq", "quantize.adaquant", False),  # grouped convolutions are left
        ("quantize.nf4", "tune.finetune", False),
        ("quantize.fp8", "quantize.bit_allocation", True),  # by quantize.adaquant
        ("quantize.fp8", "quantize.bit_allocation: {quantizer: quantize.rtn}", False),
        ("quantize.udfc", "prune.magnitude", True),
        ("quantize.bit_allocation: {quantizer: quantize.rtn}", "quantize.nf4", True),
        ("quantize.bit_allocation: {quantizer: quantize.adaquant}", "quantize.nf4", False),
    ],
)
def test_a_pass_that_finds_only_codes(first, second, refused, problems):
    data = "calibration: {data: synthetic}\ntraining: {data: synthetic}\n"
    found = problems(f"version: 1\n{data}passes:\n  - {first}\n  - {second}\nlower: []\n")
    assert any("finds only codes" in line for line in found) == refused
    assert all(line.startswith("spec.yaml:6:5: passes[1]: ") for line in found)


@pytest.mark.parametrize(
    ("cast", "refused"),
    [
        ("cast.dtype", True),
        ("cast.dtype: {to: bfloat16}", True),
        ("cast.dtype: {to: float32}", False),
        ("cast.dtype: {keep: ['*']}", False),
    ],
)
def test_a_pass_behind_a_cast_to_what_it_does_not_take(cast, refused, problems):
    found = problems(f"version: 1\npasses:\n  - {cast}\n  - quantize.int8\nlower: []\n")
    assert bool(found) == refused
    within = f"calibration: {{data: synthetic}}\npasses:\n  - {cast}\n  - quantize.bit_allocation\n"
    assert bool(problems(f"version: 1\n{within}lower: []\n")) == refused  # by quantize.adaquant
    if refused:
        to = "bfloat16" if "bfloat16" in cast else "float16"
        assert found == [
            f"spec.yaml:4:5: passes[1]: quantize.int8 does not take {to}, which cast.dtype "
            "(passes[0], line 3) makes; move it up to line 3"
        ]


@pytest.mark.parametrize("chain", [["t.a", "t.b"], ["t.b", "t.a"]])
def test_passes_that_exclude_each_other(chain):
    (only,) = check(chain, a={"conflicts": ["t.b"]}, b={})
    assert only == (
        f"spec.yaml:4:5: passes[1]: {chain[1]} cannot be in a chain with {chain[0]} (passes[0], "
        "line 3); remove one of the two"
    )


def test_a_pass_that_the_backend_cannot_lower():
    facts = {"a": {"lowers_to": ["triton"]}, "b": {"lowers_to": []}}
    assert check(["t.a"], **facts) == []
    assert check(["t.a", "t.b"], "onnxruntime", **facts) == [
        "spec.yaml:3:5: passes[0]: backend onnxruntime (line 5) cannot lower t.a; lower to triton, "
        "or remove the pass",
        "spec.yaml:4:5: passes[1]: backend onnxruntime (line 5) cannot lower t.b; remove the pass",
    ]


@pytest.mark.parametrize(
    ("need", "section"),
    [("calibration", "calibration"), ("gradients", "calibration"), ("training", "training")],
)
def test_passes_that_look_at_data_need_their_section(need, section):
    assert check(["t.a"], a={"needs": need}) == [
        f"spec.yaml:3:5: passes[0]: t.a needs data, and there is no '{section}' section; add one, "
        f"such as '{section}: {{data: samples.npz}}'"
    ]


def test_a_misspelt_pass_is_placed_like_the_one_it_means(problems):
    assert problems("version: 1\npasses: [quantize.int8, cleanup.fold_constant]\n") == [
        "spec.yaml:2:25: passes[1]: no pass named 'cleanup.fold_constant'; did you mean "
        "'cleanup.fold_constants'?",
        "spec.yaml:2:25: passes[1]: cleanup.fold_constants must come before quantize.int8 "
        "(passes[0], line 2); move it up to line 2",
    ]


def test_a_pass_that_the_model_went_through_before_counts_as_in_front():
    text = "version: 1\ncalibration: {data: synthetic}\npasses: [quantize.bn_tuning]\n"
    with pytest.raises(SpecError, match="nothing to do without"):
        parse_spec(text)
    parse_spec(f"{text}lock: {{behind: [cleanup.fold_batch_norm]}}\n")
    with pytest.raises(SpecError, match="nothing to do without"):
        parse_spec(f"{text}lock: {{behind: [cleanup.canonicalize]}}\n")
