"""Perplexity of the small GPT when a share of the weights in its blocks becomes zero.

    python tests/benchmarks/sparse_gpt.py [--patterns 0.5,0.6,0.7,2:4] [--only magnitude,wanda,...]

One thread; 128 sequences of the training text are the calibration data, and perplexity is that of
256 held-out sequences, per byte. Every method prunes the same 24 layers (all but embedding and
head) in one shot: nothing is trained. DSnoT has its defaults, and stands on the mask of the method
it is named with. M-FAC takes its mask and its step from 64 gradients at once (`steps: 1`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import gpt

from graphwright.ir.context import Context
from graphwright.ir.program import Program
from graphwright.passes.compensate.bias_correction import BiasCorrection
from graphwright.passes.prune.dsnot import Dsnot
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.prune.mfac import Mfac
from graphwright.passes.prune.sparsegpt import Sparsegpt
from graphwright.passes.prune.wanda import Wanda

TARGETS = ["blocks.*"]
SAMPLES = 128

METHODS: dict[str, Callable[..., Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": Sparsegpt,
    "magnitude + dsnot": lambda **options: Dsnot(base="magnitude", **options),
    "wanda + dsnot": lambda **options: Dsnot(base="wanda", **options),
    "wanda + bias correction": Wanda,
    "mfac": lambda **options: Mfac(steps=1, loss="next_token", **options),
}


def pruned(program: Program, method: str, pattern: str, context: Context) -> Program:
    """The program after one method; `pattern` is a share or N:M."""
    options: dict[str, Any] = {"targets": TARGETS}
    options |= {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    sparse: Program = METHODS[method](**options).execute(program, context).program
    if method.endswith("bias correction"):
        sparse = BiasCorrection(targets=TARGETS).execute(sparse, context).program
    return sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", default="0.5,0.6,0.7,2:4")
    parser.add_argument("--only", default=",".join(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patterns = arguments.patterns.split(",")
    methods = [name for name in METHODS if name in arguments.only.split(",")]
    program = gpt.program()
    context = Context(calibration=gpt.calibration(SAMPLES), teacher=program)
    print(f"dense: {gpt.perplexity(program):.3f}\n")
    print("| method | " + " | ".join(patterns) + " | processor s |")
    print("| --- |" + " ---: |" * (len(patterns) + 1))
    for method in methods:
        cells, seconds = [], 0.0
        for pattern in patterns:
            began = time.process_time()
            sparse = pruned(program, method, pattern, context)
            seconds += time.process_time() - began
            cells.append(f"{gpt.perplexity(sparse):.3f}")
        print(
            f"| {method} | " + " | ".join(cells) + f" | {seconds / len(patterns):.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
