"""OTOv2 on digits: training and compressing once, against one-shot pruning and fine-tuning.

    python tests/benchmarks/otov2_digits.py                     everything: 12 minutes on a core
    python tests/benchmarks/otov2_digits.py resnet --seeds 1    some of it

Nets in three styles, 8x8 images of scikit-learn's digits, 500 of them held out. Every net starts
import _paths  # noqa: F401  puts tests/ on the path
from random weights and is trained by SGD with momentum and a cosine schedule. 70% of the
zero-invariant groups go, and every group of channels keeps a multiple of four. FLOPs are
multiply-accumulates of convolutions and linear layers, as in the paper's tables; accuracy is the
mean over the seeds on the held-out images, with the standard deviation.

Rows: `dense` trains; `HESSO` and `DHSPG` are prune.otov2, which trains, prunes and cuts in one run
of as many steps; `one-shot` trains half the steps, removes 70% by magnitude (prune.zig) and trains
the other half; `dense, one-shot` prunes the trained dense net and trains as many steps again, twice
the budget. One-shot chooses units over the whole net, or the same share of every group.

All settings were chosen as `--validate` measures: trained on 1000 of the training images from
other weights, judged by the 297 others. The held-out images took no part. The rule of the update
and its rate are those of OTOv2's published runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from models import digits

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.graph.cost import cost
from graphwright.passes.prune import Otov2, Zig
from graphwright.passes.tune import Finetune

EPOCHS = 40
RULE: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
SPARSITY = 0.7
VALIDATE_ON, VALIDATION_SEED = 1000, 100
"""Images that `--validate` trains on, and the first of its seeds."""
START = 0.2
"""Share of the steps before the sparse optimizers act."""
HESSO: dict[str, Any] = {"method": "hesso"}
DHSPG: dict[str, Any] = {"method": "dhspg", "epsilon": 0.95, "penalty": 0.2}
SCOPES = {"whole net": "global", "each group": "group"}


@dataclass(frozen=True)
class Row:
    """One net at one seed."""

    accuracy: float
    macs: float
    parameters: int


@dataclass(frozen=True)
class Trial:
    """A net at a seed, and everything that is done to it from the same weights."""

    net: str
    seed: int
    divisible: int
    images: int | None

    @property
    def steps(self) -> int:
        return EPOCHS * ((self.images or 1297) // digits.BATCH)

    def runs(self) -> Iterator[tuple[str, Row]]:
        """Every method in turn."""
        start = digits.traced(digits.reset(digits.NETS[self.net](), self.seed))
        context = Context(seed=self.seed, training=digits.training(start, images=self.images))
        oto: dict[str, Any] = {
            "sparsity": SPARSITY, "group_divisible": self.divisible, "tune": self.tune(1),
            "start_pruning_step": int(START * self.steps),
        }  # fmt: skip

        def train(program: gw.Program, share: float) -> gw.Program:
            return Finetune(tune=self.tune(share)).execute(program, context).program

        def one_shot(program: gw.Program, scope: str) -> gw.Program:
            step = Zig(sparsity=SPARSITY, scope=scope, group_divisible=self.divisible,
                       score="magnitude", normalize="none", max_ratio=0.99)  # fmt: skip
            return step.execute(program, context).program

        dense = train(start, 1)
        yield "dense", self.measure(dense)
        for name, own in (("HESSO", HESSO), ("DHSPG", DHSPG)):
            yield name, self.measure(Otov2(**oto, **own).execute(start, context).program)
        half = train(start, 0.5)
        for name, scope in SCOPES.items():
            yield f"one-shot, {name}", self.measure(train(one_shot(half, scope), 0.5))
        for name, scope in SCOPES.items():
            yield f"dense, one-shot, {name}", self.measure(train(one_shot(dense, scope), 1))

    def tune(self, share: float) -> dict[str, Any]:
        return {"steps": int(self.steps * share), **RULE}

    def measure(self, program: gw.Program) -> Row:
        """Accuracy and size; multiply-accumulates of one image."""
        macs = cost(program).macs / program.examples[0].shape[0]
        parameters = sum(p.numel() for p in program.parameters().values())
        return Row(digits.accuracy(program, self.images), macs, parameters)


def line(net: str, method: str, rows: list[Row], base: Row) -> str:
    """A row of the table: means over the seeds."""
    macs = statistics.mean(row.macs for row in rows)
    parameters = statistics.mean(row.parameters for row in rows)
    accuracies = [100 * row.accuracy for row in rows]
    return (
        f"| {net} | {method} | {macs / base.macs:.1%} ({macs / 1e6:.2f}M) "
        f"| {parameters / base.parameters:.1%} ({parameters / 1e3:.1f}k) "
        f"| {statistics.mean(accuracies):.2f} ± {statistics.pstdev(accuracies):.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nets", nargs="*", default=["vgg", "resnet", "densenet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--divisible", type=int, default=4, help="every group keeps a multiple")
    parser.add_argument("--validate", action="store_true", help="on a part of the training images")
    options = parser.parse_args()
    begin = time.process_time()
    first, images = (VALIDATION_SEED, VALIDATE_ON) if options.validate else (0, None)
    print("| net | method | FLOPs | params | accuracy |")
    print("| --- | --- | ---: | ---: | ---: |")
    for net in options.nets:
        found: dict[str, list[Row]] = {}
        for seed in range(first, first + options.seeds):
            trial = Trial(net, seed, options.divisible, images)
            for method, row in trial.runs():
                found.setdefault(method, []).append(row)
        for method, rows in found.items():
            print(line(net, method, rows, found["dense"][0]), flush=True)
    print(f"\n{trial.steps} steps, {options.seeds} seeds, "
          f"{time.process_time() - begin:.0f} s of processor")  # fmt: skip


if __name__ == "__main__":
    main()
