"""OTOv2 on digits: training and compressing once, against one-shot pruning and fine-tuning.

    python tests/benchmarks/otov2_digits.py                     everything, minutes on a core
    python tests/benchmarks/otov2_digits.py resnet --seeds 1    some of it

Nets in three styles, 8x8 images of scikit-learn's digits, 500 of them held out. Every net starts
from random weights and gets the same budget of steps with AdamW. 70% of the zero-invariant groups
go. FLOPs are multiply-accumulates of convolutions and linear layers, as in the paper's tables;
accuracy is the mean over the seeds on the held-out images, with the standard deviation.

Rows: `dense` trains; `HESSO` and `DHSPG` are prune.otov2, which trains, prunes and cuts in one run;
`one-shot, same budget` trains half the steps, removes 70% of the groups by magnitude (prune.zig)
and trains the other half; `one-shot, twice the budget` prunes the trained dense net and trains as
many steps again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import digits

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.cost import cost
from graphwright.passes.prune import Otov2, Zig
from graphwright.passes.tune import Finetune

EPOCHS, LR = 20, 5e-3
SPARSITY = 0.7
STEPS = EPOCHS * (1297 // digits.BATCH)
HESSO = {"start_pruning_step": STEPS // 5, "pruning_steps": 3 * STEPS // 10}
DHSPG = {"method": "dhspg", "epsilon": 0.95, "penalty": 4.0}
METHODS = ("dense", "HESSO", "DHSPG", "one-shot, same budget", "one-shot, twice the budget")


@dataclass(frozen=True)
class Row:
    """One net at one seed."""

    accuracy: float
    macs: float
    parameters: int


def measure(program: gw.Program) -> Row:
    """Accuracy and size; multiply-accumulates of one image."""
    macs = cost(program).macs / program.examples[0].shape[0]
    parameters = sum(p.numel() for p in program.parameters().values())
    return Row(digits.accuracy(program), macs, parameters)


def runs(net: str, seed: int, divisible: int, scope: str) -> dict[str, Row]:
    """Every method from the same weights."""
    start = digits.traced(digits.reset(digits.NETS[net](), seed))
    context = Context(seed=seed, training=digits.training(start))

    def tune(epochs: float) -> dict[str, Any]:
        steps = int(STEPS * epochs)
        return {"steps": steps, "lr": LR, "weight_decay": digits.WEIGHT_DECAY}

    def train(program: gw.Program, share: float) -> gw.Program:
        return Finetune(tune=tune(share)).execute(program, context).program

    def one_shot(program: gw.Program) -> gw.Program:
        step = Zig(sparsity=SPARSITY, scope=scope, group_divisible=divisible)
        return step.execute(program, context).program

    def oto(**options: Any) -> gw.Program:
        step = Otov2(sparsity=SPARSITY, group_divisible=divisible, tune=tune(1), **options)
        return step.execute(start, context).program

    dense = train(start, 1)
    half = train(one_shot(train(start, 0.5)), 0.5)
    twice = train(one_shot(dense), 1)
    found = (dense, oto(**HESSO), oto(**DHSPG), half, twice)
    return {method: measure(program) for method, program in zip(METHODS, found, strict=True)}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nets", nargs="*", default=["vgg", "resnet", "densenet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--divisible", type=int, default=1, help="every group keeps a multiple")
    parser.add_argument("--scope", default="global", help="of the one-shot rows: or group")
    options = parser.parse_args()
    begin = time.process_time()
    print("| net | method | FLOPs | params | accuracy |")
    print("| --- | --- | ---: | ---: | ---: |")
    for net in options.nets:
        found = [runs(net, seed, options.divisible, options.scope) for seed in range(options.seeds)]
        base = found[0]["dense"]
        for method in METHODS:
            rows = [run[method] for run in found]
            macs, parameters = (statistics.mean(v) for v in zip(*((r.macs, r.parameters)
                                for r in rows), strict=True))  # fmt: skip
            accuracies = [100 * r.accuracy for r in rows]
            print(
                f"| {net} | {method} | {macs / base.macs:.1%} ({macs / 1e6:.2f}M) "
                f"| {parameters / base.parameters:.1%} ({parameters / 1e3:.1f}k) "
                f"| {statistics.mean(accuracies):.2f} ± {statistics.pstdev(accuracies):.2f} |",
                flush=True,
            )
    print(
        f"\n{STEPS} steps, {options.seeds} seeds, {time.process_time() - begin:.0f} s of processor"
    )


if __name__ == "__main__":
    main()
