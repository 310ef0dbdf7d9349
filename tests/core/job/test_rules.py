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


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("quantize.bit_allocation: {quantizer: quantize.rtn, options: {block: -7}}",
         "greater than or equal to -1"),
    ],
)  # fmt: skip
def test_values_of_a_quantizer_inside_are_checked(tmp_path: Path, entry: str, said: str) -> None:
    spec = load_spec(written(tmp_path, f"  - {entry}\n"))
    with pytest.raises(SpecError, match=said) as found:
        check_rules(spec)
    assert found.value.problems[0].line == 4


def test_options_that_go_together_pass(tmp_path: Path) -> None:
    text = "  - quantize.gptq: {act_order: true, static_groups: true}\n"
    assert check_rules(load_spec(written(tmp_path, text))) is None
    assert check_rules(load_spec("int4")) is None
