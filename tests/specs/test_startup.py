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
        "from graphwright.specs import load_spec, resolve; resolve(load_spec('int8_static'))",
        "from graphwright.specs.catalogue import list_passes; list_passes()",
    ],
    ids=["import", "refused", "accepted", "catalogue"],
)
def test_nothing_heavy_is_imported(code):
    modules = imported(code)
    assert "graphwright" in modules
    assert not modules & HEAVY


def test_importing_specs_reads_no_yaml():
    assert not imported("import graphwright.specs") & {"yaml", "jsonschema", "pydantic"}


def test_a_wrong_spec_is_refused_within_half_a_second_of_processor_time():
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", REFUSED], check=True)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # The least of three: other work on the machine makes processor time longer, never shorter.
    assert min(seconds() for _ in range(3)) < 0.5
