"""Specs are checked without the libraries that open models, and soon."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "networkx", "onnx", "onnxscript", "onnxruntime", "triton", "scipy"}


def imported(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after running `code`."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines[1:]}


CHAIN = """
from graphwright.ir.errors import SpecError
from graphwright.specs import parse_spec
text = (
    "version: 1\\nmodel: {dtype: bfloat16}\\n"
    "passes: [cast.dtype, quantize.rtn, quantize.nf4]\\n"
    "lower: [{onnxruntime: {skip: [atention]}}]\\n"
)
try:
    parse_spec(text)
except SpecError as error:
    found = [str(problem) for problem in error.problems]
else:
    raise SystemExit(1)
assert found[0].startswith("spec:2:16: model.dtype: onnxruntime does not run bfloat16"), found
assert "passes[2]: quantize.nf4 finds only codes" in found[1], found
assert found[2].startswith("spec:4:31: lower[0].skip[0]: "), found
assert found[2].endswith("did you mean 'attention'?"), found
"""

REFUSED = """
from graphwright.ir.errors import SpecError
from graphwright.specs import load_spec
try:
    load_spec("int8", ["passes.0=cleanup.canonicalise", "sed=1"])
except SpecError as error:
    assert len(error.problems) == 2
else:
    raise SystemExit(1)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import graphwright.specs",
        REFUSED,
        CHAIN,
        "from graphwright.specs import load_spec, resolve; resolve(load_spec('int8_static'))",
        "from graphwright.specs.catalogue import list_passes; list_passes()",
    ],
    ids=["import", "refused", "chain", "accepted", "catalogue"],
)
def test_nothing_heavy_is_imported(code):
    modules = imported(code)
    assert "graphwright" in modules
    assert not modules & HEAVY


def test_importing_specs_reads_no_yaml():
    assert not imported("import graphwright.specs") & {"yaml", "jsonschema", "pydantic"}


def test_a_wrong_spec_is_refused_within_half_a_second_of_processor_time():
    # As in an installed package, modules are compiled by the first run at the latest.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", REFUSED], check=True, env=environment)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # The least of three: other work on the machine makes processor time longer, never shorter.
    assert min(seconds() for _ in range(3)) < 0.5
