"""ResNet-50 at half of its multiply-accumulates, on ONNX Runtime's CPU, in float32 and int8.

    python tests/benchmarks/resnet50_pruned.py
    python tests/benchmarks/resnet50_pruned.py --image 96 --divisible 1 16

One spec each: `prune.zig` (of: macs, at 50%), `quantize.int8` with static ranges, `onnxruntime`,
beside the same spec without pruning. Weights and images are random: nothing here depends on what
they are. Time is processor time of one thread per image, the median of calls in alternation, so
that other work on the machine counts little. The goal: the time falls by 0.6 of what the work
falls by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
GOAL = 0.6


def main() -> int:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--divisible", type=int, nargs="+", default=[1, 16],
                        help="values of group_divisible to try")  # fmt: skip
    parser.add_argument("--types", nargs="+", default=["float32", "int8"])
    parser.add_argument("--seconds", type=float, default=10, help="of measuring per type")
    options = parser.parse_args()
    print("| type | channels | MACs left | ms | time left | fall of time / fall of MACs |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    reached = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = prepare(folder, options.image)
        for kind in options.types:
            built = {d: compile_one(folder, kind, d) for d in [0, *options.divisible]}
            times = measure({d: run for d, (_, run) in built.items()}, images, options.seconds)
            for d, (macs, _) in built.items():
                left, work = times[d] / times[0], macs / built[0][0]
                share = (1 - left) / (1 - work) if d else float("nan")
                reached &= d != max(options.divisible) or share >= GOAL
                what = f"multiples of {d}" if d else "all"
                cell = f"{share:.2f}" if d else ""
                print(f"| {kind} | {what} | {work:.3f} | {times[d] * 1e3:.1f} | {left:.2f} "
                      f"| {cell} |", flush=True)  # fmt: skip
    return 0 if reached else 1


def prepare(folder: Path, side: int) -> Any:
    """Saves the traced model and calibration images; returns one image."""
    import numpy as np
    import torch
    import transformers

    import graphwright as gw

    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    images = torch.randn(4, 3, side, side)
    dynamic = {"pixel_values": {0: "batch"}}
    program = gw.trace(model.eval(), {"pixel_values": images[:2]}, dynamic=dynamic)
    program.save(folder / "model.pt2")
    np.savez(folder / "images.npz", pixel_values=images.numpy())
    return images[:1]


def compile_one(folder: Path, kind: str, divisible: int) -> tuple[int, Any]:
    """Multiply-accumulates and the artifact; `divisible` 0 leaves all channels."""
    import graphwright as gw

    passes = ["  - cleanup.fold_batch_norm"]
    if divisible:
        passes.append(f"  - prune.zig: {{sparsity: 0.5, of: macs, group_divisible: {divisible}}}")
    if kind == "int8":
        passes.append("  - quantize.int8: {activations: static}")
    spec = folder / f"{kind}_{divisible}.yaml"
    lines = ["version: 1", "calibration: {data: images.npz, samples: 4, batch_size: 2}", "passes:",
             *passes, "lower:", "  - onnxruntime", ""]  # fmt: skip
    spec.write_text("\n".join(lines))
    out = folder / spec.stem
    gw.optimize(folder / "model.pt2", spec, out=out)
    report = json.loads((out / "report.json").read_text())
    artifact = report["result"]["artifacts"][0]["path"]
    return report["result"]["macs"], gw.load(out / artifact)


def measure(runs: dict[int, Any], image: Any, seconds: float) -> dict[int, float]:
    """Median processor seconds of a call."""
    found: dict[int, list[float]] = {name: [] for name in runs}
    end = time.process_time() + seconds
    for run in runs.values():
        run(image)
    while time.process_time() < end or len(found[0]) < 5:
        for name, run in runs.items():
            start = time.process_time()
            run(image)
            found[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in found.items()}


if __name__ == "__main__":
    sys.exit(main())
