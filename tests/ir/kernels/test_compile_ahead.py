"""Every kernel compiles for A100 and H100, within their limits, into the code it is meant to be."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one program may ask for; going over compiles without complaint."""

ISSUE_BUDGET = 7.7
"""Instructions per int8 weight at which a GEMV stops being bound by memory: a multiprocessor
receives about 16.5 bytes in a clock and issues 128 lane instructions."""

ISSUE_BUDGET_4 = {80: 5.9, 90: 3.9}
"""The same per weight of 4 bits: an A100's multiprocessor receives 10.8 bytes in a clock."""


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """One child process compiles the table: the interpreter's switch must be off from the start."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_function_is_in_the_table(records: list[dict[str, Any]]) -> None:
    folder = Path(__file__).parents[3] / "ir" / "kernels"
    written = {
        line.split("(")[0].removeprefix("def ").removesuffix("_kernel")
        for file in folder.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    compiled = {record["kernel"].removesuffix("_kernel") for record in records}
    assert written == compiled


def test_within_the_limits_of_the_device(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["shared"] <= SHARED_LIMIT[record["capability"]], record
        assert record["registers"] <= 255, record
        assert record["stack"] <= 32, record
        assert record["loop_spills"] == 0, record


def test_loads_are_wide(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["vector_loads"] > 0, record


def test_matrix_products_use_tensor_cores_and_pipelined_copies(
    records: list[dict[str, Any]],
) -> None:
    products = [r for r in records if r["kernel"] == "gemm_kernel"]
    assert len(products) >= 24
    for record in products:
        large = record["capability"] == 90 and "gemm-16-" not in record["name"]
        assert record["wgmma" if large else "mma"] > 0, record
        assert record["async_copies"] > 0, record
    routed = [r for r in records if r["kernel"] in ("to_rank_kernel", "from_rank_kernel")]
    assert len(routed) == 8
    for record in routed:
        assert record["wgmma"] + record["mma"] > 0, record
        assert record["async_copies"] > 0, record


def test_attention_over_a_cache_uses_tensor_cores_but_for_exact_float32(
    records: list[dict[str, Any]],
) -> None:
    found = [r for r in records if r["kernel"] == "attend_kernel"]
    assert len(found) == 10
    for record in found:
        products = record["wgmma"] + record["mma"]
        assert (products == 0) == record["name"].endswith("fp32"), record


def test_one_token_is_bound_by_memory_not_by_instructions(records: list[dict[str, Any]]) -> None:
    counts = [r["per_weight"] for r in records if r["name"].startswith("int8_gemv")]
    assert len(counts) == 2
    assert max(counts) <= ISSUE_BUDGET
    counts = [r["per_weight"] for r in records if r["name"].startswith("blocks_gemv-8-1")]
    assert len(counts) == 2
    assert max(counts) <= ISSUE_BUDGET
    found = {r["capability"]: r for r in records if r["name"].startswith("blocks_gemv-4-1")}
    for capability, budget in ISSUE_BUDGET_4.items():
        assert found[capability]["per_weight"] <= budget


def test_subnormal_numbers_are_kept(records: list[dict[str, Any]]) -> None:
    """The dot product of codes reads them as such."""
    dots = [r for r in records if r["name"].startswith("blocks_gemv")]
    assert len(dots) == 6
    assert not any(record["flushes"] for record in dots)
