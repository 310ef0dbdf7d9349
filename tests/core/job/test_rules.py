from __future__ import annotations

from pathlib import Path

import pytest

from graphwright.ir.errors import SpecError
from graphwright.job.rules import check_rules
from graphwright.specs import load_spec

HEAD = """version: 1
calibration: {data: synthetic, samples: 4, batch_size: 2}
passes:
"""


def written(folder: Path, text: str) -> str:
    path = folder / "spec.yaml"
    path.write_text(HEAD + text)
    return str(path)


def test_options_that_do_not_go_together_are_found_with_their_place(tmp_path: Path) -> None:
    text = (
        "  - quantize.gptq: {act_order: true}\nlower:\n  - onnxruntime: {weights: qdq, opset: 19}\n"
    )
    spec = load_spec(written(tmp_path, text))
    with pytest.raises(SpecError) as found:
        check_rules(spec)
    first, second = found.value.problems
    assert (first.line, first.path) == (4, "passes[0]")
    assert "act_order takes static_groups: true" in first.message
    assert (second.line, second.path) == (6, "lower[0]")
    assert "needs opset 21" in second.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{quantizer: quantize.gpt}", "no pass named"),
        ("{quantizer: prune.zig}", "has no options `bits` and `targets`"),
        ("{quantizer: quantize.rtn, options: {blocks: 4}}", "Extra inputs are not permitted"),
        ("{measure: latency}", "no `table` is given"),
    ],
)
def test_the_options_of_a_quantizer_inside_are_checked(
    tmp_path: Path, options: str, said: str
) -> None:
    spec = load_spec(written(tmp_path, f"  - quantize.bit_allocation: {options}\n"))
    with pytest.raises(SpecError, match=said):
        check_rules(spec)


def test_options_that_go_together_pass(tmp_path: Path) -> None:
    text = "  - quantize.gptq: {act_order: true, static_groups: true}\n"
    assert check_rules(load_spec(written(tmp_path, text))) is None
    assert check_rules(load_spec("int4")) is None
