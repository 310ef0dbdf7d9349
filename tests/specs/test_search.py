"""The section `search`: its candidates, and everything wrong with it at its place."""

from __future__ import annotations

import pytest

from graphwright.specs import parse_spec, resolve
from graphwright.specs.space import Range, Space
from graphwright.specs.spec import candidate_spec
from graphwright.specs.written import written_specs

HEAD = """\
version: 1
passes:
  - cleanup.fold_batch_norm
  - quantize.rtn: {bits: 4}
lower: [onnxruntime]
search:
"""
REST = "  objective: [file_mb]\n  strategy: grid\n"
SPACE = "  space:\n    passes.1.bits: {choices: [4]}\n"


def _with(space: str, rest: str = REST) -> str:
    lines = "".join(f"    {line}\n" for line in space.splitlines())
    return f"{HEAD}  space:\n{lines}{rest}"


def _chains(text: str) -> list[list]:
    spec = parse_spec(text)
    space = Space.of(spec.document)
    found = [candidate_spec(spec, space, picks) for picks in space.all_picks()]
    return [[(call.id, call.options.get("bits")) for call in each.passes] for each in found]


def test_a_grid_has_every_combination_and_none_of_a_step_that_is_left_out() -> None:
    fold = ("cleanup.fold_batch_norm", None)
    space = """\
passes.1: {choices: [quantize.rtn, quantize.nf4, none]}
passes.quantize.rtn.bits: {range: [2, 4]}
passes.0: {choices: [cleanup.fold_batch_norm, none]}
"""
    rtn = [("quantize.rtn", bits) for bits in (2, 3, 4)]
    expected = [[fold, step] for step in rtn] + [[step] for step in rtn]
    expected += [[fold, ("quantize.nf4", None)], [("quantize.nf4", None)], [fold], []]
    assert sorted(map(str, _chains(_with(space)))) == sorted(map(str, expected))


def test_a_candidate_is_an_ordinary_spec_in_the_same_folder() -> None:
    spec = parse_spec(_with("passes.1.bits: {choices: [8]}"), folder="somewhere")
    written, other = written_specs(spec)
    assert (written.search, other.search, other.folder) == (None, None, spec.folder)
    assert "search" in resolve(spec)
    assert "search" not in resolve(other)
    assert other.passes[1].options == {"bits": 8}


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ({"range": [2, 8]}, [2, 3, 4, 5, 6, 7, 8]),
        ({"range": [2, 8], "step": 4}, [2, 6]),
        ({"range": [0.1, 0.4], "step": 0.1}, [0.1, 0.2, 0.3, 0.4]),
        ({"range": [0, 1.0]}, None),
        ({"range": [1e-4, 1e-1], "log": True}, None),
    ],
)
def test_values_of_a_range(written, values) -> None:
    found = Range.of(written).listed()
    assert found == (values if values is None else pytest.approx(values))


@pytest.mark.parametrize(
    ("space", "place", "message"),
    [
        ("passes.1.bits: {choices: [4, 77]}", "8:34", "expected 8 or less, got 77"),
        ("passes.1.bit: {choices: [4]}", "8:30", "no option 'bit'; did you mean 'bits'?"),
        ("passes.7.bits: {choices: [4]}", "8:20", "no entry 7; the last is 1"),
        ("passes.1: {choices: [quantize.rtm]}", "8:26", "did you mean 'quantize.rtn'?"),
        ("passes.1: {choices: [quantize.gptq]}", "8:26", "needs data"),
        ("passes.quantize.gptq.bits: {choices: [4]}", "8:32", "no candidate has this place"),
        ("evaluate.metric: {choices: [cosine]}", "8:22", "'evaluate' cannot vary"),
        ("passes.1.bits: {choices: [4], range: [2, 4]}", "8:30", "give `choices`"),
        ("passes.1.bits: {}", "8:20", "give `choices`"),
        ("passes.1.bits: {range: [4, 2]}", "8:28", "expected [lowest, highest]"),
        ("passes.1.bits: {choices: [4], step: 1}", "8:41", "step is for a `range`"),
        ("passes.1.max_error: {range: [0.1, 0.2]}", "8:25", "a grid needs `step`"),
        ("passes.1.max_error: {range: [-1.0, 0.2], step: 0.1}", "8:25", "expected more than 0"),
    ],
)
def test_a_wrong_space_is_refused_at_its_place(problems, space, place, message) -> None:
    (found,) = problems(_with(space))
    assert found.startswith(f"spec.yaml:{place}: search.space")
    assert message in found


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("  objective: [file_mb]\n", "tpe needs a budget"),
        ("  objective: []\n  strategy: grid\n", "give one measure, or two"),
        ("  objective: [size]\n  strategy: grid\n", "expected one of file_mb"),
        ("  objective: [drop]\n  strategy: grid\n", "there is no 'evaluate' section"),
        ("  objective: [file_mb]\n  strategy: grod\n", "did you mean 'grid'?"),
        ("  objective: [file_mb]\n  trials: 0\n", "expected 1 or more, got 0"),
    ],
)
def test_a_wrong_section_is_refused(problems, rest, message) -> None:
    (found,) = problems(HEAD + SPACE + rest)
    assert message in found


def test_values_below_an_entry_are_checked_in_each_of_its_alternatives(problems) -> None:
    space = """\
passes.1: {choices: [quantize.rtn, quantize.nf4]}
passes.1.bits: {choices: [4]}
"""
    (found,) = problems(_with(space))
    assert "quantize.nf4 has no option 'bits'" in found
    assert found.endswith("(where passes.1 is 'quantize.nf4')")
