"""Estimates of `--plan` against what runs took: the sentence encoder and a digits ResNet.

    python tests/benchmarks/plan.py [--only NAME]...

Runs each spec once and prints, for the passes, the lowering and the whole behind tracing, seconds
and peak memory as estimated and as measured. Times measured are those of the processor in one
thread, which other work on the machine does not lengthen; latency is left out, for its time is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _paths
import numpy as np

INPUTS = """version: 1
model:
  inputs:
    input_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 30522]}
    attention_mask: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [1, 2]}
    token_type_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 2]}
calibration: {data: data/calibration.npz, samples: 64}
"""
DIGITS = "version: 1\nevaluate: {data: test.npz, metric: accuracy}\nlower: [onnxruntime]\n"
ENCODER = {
    "int8": "passes: [quantize.int8]\nlower: [onnxruntime]\n",
    "int4": "passes: [quantize.rtn]\nlower: [onnxruntime]\n",
    "GPTQ": "passes: [quantize.gptq]\nlower: [onnxruntime]\n",
    "SVD": "passes: [{decompose.svd: {ratio: 0.5}}]\nlower: [onnxruntime]\n",
    "SparseGPT": "passes: [prune.sparsegpt]\nlower: [triton]\n",
}
RESNET = {
    "finetune": "training: {data: train.npz, batch_size: 32}\n"
    "passes: [{tune.finetune: {tune: {epochs: 3, loss: cross_entropy}}}]\n",
    "prune": "calibration: {data: train.npz, samples: 128}\n"
    "passes: [{prune.zig: {sparsity: 0.3, score: taylor}}]\n",
}
SET = ("latency",)


def prepare(folder: Path) -> None:
    """Models and data."""
    from models import digits

    script = _paths.ROOT / "docs" / "demo" / "prepare.py"
    subprocess.run([sys.executable, str(script), str(folder / "data")], check=True)
    program = digits.traced(digits.trained("resnet"))
    program.save(folder / "resnet.pt2")
    name = program.signature.inputs[0].name
    x, y, x_test, y_test = (tensor.numpy() for tensor in digits.data())
    np.savez(folder / "train.npz", **{name: x}, labels=y)
    np.savez(folder / "test.npz", **{name: x_test}, labels=y_test)


def ran(folder: Path, name: str) -> list[dict[str, Any]]:
    """Stages of one run that have an estimate."""
    is_encoder = name in ENCODER
    model = "data/all-MiniLM-L6-v2" if is_encoder else "resnet.pt2"
    text = INPUTS + ENCODER[name] if is_encoder else DIGITS + RESNET[name]
    (folder / f"{name}.yaml").write_text(text)
    command = [str(Path(sys.executable).parent / "optimize"), model, "--spec", f"{name}.yaml",
               "--out", f"out-{name}", "--quiet"]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    report = json.loads((folder / f"out-{name}" / "report.json").read_text())
    return [row for row in report["stages"] if row["estimated"] and row["name"] not in SET]


def line(name: str, what: str, rows: list[dict[str, Any]]) -> str:
    """A row of the table: sums of times, and the highest peak."""
    told = sum(row["estimated"]["seconds"] for row in rows)
    took = sum(row["processor_seconds"] for row in rows)
    high = max(row["estimated"]["peak_rss_bytes"] for row in rows)
    peak = max(row["peak_rss_bytes"] for row in rows)
    return (f"| {name} | {what} | {told:.2f} | {took:.2f} | {told / took:.2f} "
            f"| {high / 1e6:.0f} | {peak / 1e6:.0f} | {high / peak:.2f} |")  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", choices=[*ENCODER, *RESNET])
    names = parser.parse_args().only or [*ENCODER, *RESNET]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(
        "| spec | stages | estimated s | measured s | ratio | estimated MB | measured MB | ratio |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for name in names:
            rows = ran(folder, name)
            print(line(name, rows[1]["name"].partition(" ")[2], rows[1:2]), flush=True)
            lowered = [row for row in rows if row["name"] in ("onnxruntime", "triton")]
            print(line(name, lowered[0]["name"], lowered))
            print(line(name, "all", rows), flush=True)


if __name__ == "__main__":
    main()
