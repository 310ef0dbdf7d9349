"""From import to int8 artifact, ours against `torch.onnx.export` + `quantize_dynamic`; start-up.

    python tests/benchmarks/compile_time.py [--rounds 3]

Whole processes in alternation, medians of wall and processor time. Ours verifies every step,
measures latency and writes a report while it is at it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SPEC = """
version: 1
model:
  inputs:
    input_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 30522]}
    attention_mask: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [1, 2]}
    token_type_ids: {dtype: int64, shape: [batch, seq], example: [8, 64], range: [0, 2]}
passes: [{quantize.int8: {activations: dynamic}}]
lower: [onnxruntime]
"""
PEER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from transformers import AutoModel
from encoder import plain_export
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
folder = Path(sys.argv[2])
plain_export(AutoModel.from_pretrained(sys.argv[1]).eval(), folder / "plain.onnx")
quant_pre_process(folder / "plain.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
quantize_dynamic(folder / "prepared.onnx", folder / "int8.onnx", per_channel=True,
                 weight_type=QuantType.QInt8)
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode not in (0, 2):
        raise SystemExit(ran.stderr[-2000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def main() -> None:
    """Times the commands in turn and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, str(ROOT / "docs/demo/prepare.py"), str(folder / "data")]
        subprocess.run(prepare, check=True, capture_output=True)
        (folder / "spec.yaml").write_text(SPEC)
        (folder / "bad.yaml").write_text(SPEC.replace("quantize.int8", "quantise.int8"))
        model = str(folder / "data" / "all-MiniLM-L6-v2")
        optimize = str(BIN / "optimize")
        commands = {
            "graphwright, verified": [
                optimize, model, "--spec", str(folder / "spec.yaml"),
                "--out", str(folder / "out"), "--quiet",
            ],
            "torch.onnx.export + quantize_dynamic": [
                sys.executable, "-c", PEER, model, str(folder), str(Path(__file__).parent),
            ],
            "optimize --help": [optimize, "--help"],
            "optimize with a broken spec": [optimize, model, "--spec", str(folder / "bad.yaml")],
        }  # fmt: skip
        results: dict[str, list[tuple[float, float]]] = {key: [] for key in commands}
        for _ in range(rounds):
            for key, command in commands.items():
                results[key].append(timed(command))
    print("| command | wall s | processor s |\n| --- | ---: | ---: |")
    wall = {}
    for key, pairs in results.items():
        wall[key] = statistics.median(w for w, _ in pairs)
        print(f"| {key} | {wall[key]:.2f} | {statistics.median(c for _, c in pairs):.2f} |")
    first, second = list(wall.values())[:2]
    print(f"\nours / theirs: {first / second:.2f}")


if __name__ == "__main__":
    main()
