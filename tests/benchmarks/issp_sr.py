"""Sparse super-resolution by iterative soft shrinkage, on scikit-learn's two photographs, x2.

    python tests/benchmarks/issp_sr.py [--seeds 3] [--steps 800]

A small residual network learns to double the size of patches from the left two thirds of the
pictures; the right third is held out. Every row has the same number of optimizer steps: ISS-P and
iterative hard thresholding (IHT) start from fresh weights, one-shot magnitude pruning has a dense
first half and fine-tunes under its mask in the second. Prints PSNR in dB over all held-out patches,
mean and standard deviation over seeds (of weights and data order), and the share of the pruned set
that changes from one step to the next.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.prune.issp import Issp
from graphwright.passes.tune.finetune import Finetune

PATCH, STRIDE, BATCH, CHANNELS, BLOCKS = 24, 12, 16, 16, 2
RATIOS = (0.9, 0.95)
Split = tuple[Tensor, Tensor]
"""Small patches (n, 1, 12, 12) and the large ones (n, 1, 24, 24), in [0, 1]."""


def l1(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that the paper trains with."""
    return (outputs - batch["labels"]).abs().mean()


TUNE = {"optimizer": "adam", "lr": 2e-3, "loss": "issp_sr:l1"}


class Residual(nn.Module):
    """Two convolutions and a skip, as in EDSR."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Net(nn.Module):
    """EDSR's form: what it adds to the enlarged pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.body = nn.Sequential(*(Residual() for _ in range(BLOCKS)))
        self.tail = nn.Conv2d(CHANNELS, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        return nn.functional.pixel_shuffle(self.tail(self.body(h) + h) + x, 2)


def photographs() -> tuple[Split, Split]:
    """Patches to train on and held-out ones, of the luminance."""
    from sklearn.datasets import load_sample_images

    found = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    grey = (found.float() / 255) @ torch.tensor([0.299, 0.587, 0.114])
    edge = grey.shape[2] * 2 // 3
    return _pairs(grey[..., :edge], STRIDE), _pairs(grey[..., edge:], PATCH)


def _pairs(grey: Tensor, stride: int) -> Split:
    large = grey.unfold(1, PATCH, stride).unfold(2, PATCH, stride).reshape(-1, 1, PATCH, PATCH)
    small = nn.functional.interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True)
    return small, large.contiguous()


def psnr(shown: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise ratio in dB, for a peak of 1."""
    return -10 * math.log10(float((shown.clamp(0, 1) - wanted).square().mean()))


def run(step: gw.Pass, program: gw.Program, data: list[Split], seed: int) -> Any:
    """The pass's result."""
    return step.execute(program, Context(training=data, seed=seed))


def one_seed(seed: int, steps: int, train: Split, held_out: Split) -> dict[str, tuple[float, ...]]:
    """PSNR and churn by the name of the row."""
    torch.manual_seed(seed)
    fresh = gw.trace(Net().eval(), (train[0][:2],), {"x": {0: "batch"}})
    order = torch.randperm(len(train[0]))[: len(train[0]) // BATCH * BATCH].split(BATCH)
    data = [(train[0][rows], train[1][rows]) for rows in order]
    whole, half = {**TUNE, "steps": steps}, {**TUNE, "steps": steps // 2}
    results = {"dense": run(Finetune(tune=whole), fresh, data, seed)}
    begun = run(Finetune(tune=half), fresh, data, seed).program
    for ratio in RATIOS:
        for name, rho in (("ISS-P", 0.95), ("ISS-P, rho 0.99", 0.99), ("IHT", 0.0)):
            step: gw.Pass = Issp(sparsity=ratio, rho=rho, tune=whole)
            results[f"{ratio:.0%} {name}"] = run(step, fresh, data, seed)
        step = Issp(sparsity=ratio, rho=0.0, shrink=1e-9, tune=half)  # freezes in its first step
        results[f"{ratio:.0%} one-shot magnitude"] = run(step, begun, data, seed)
    with torch.no_grad():
        return {
            name: (psnr(r.program(held_out[0]), held_out[1]), r.metrics.get("churn", 0.0))
            for name, r in results.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    train, held_out = photographs()
    seeds = [one_seed(seed, given.steps, train, held_out) for seed in range(given.seeds)]
    blurred = nn.functional.interpolate(held_out[0], scale_factor=2.0, mode="bicubic")
    print(f"{len(train[0])} patches, {given.steps} steps, {given.seeds} seeds\n")
    print("| row | PSNR dB | churn per step |\n| --- | ---: | ---: |")
    print(f"| bicubic enlargement | {psnr(blurred, held_out[1]):.2f} | |")
    for name in seeds[0]:
        values, churn = zip(*(found[name] for found in seeds), strict=True)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        shown = f"{statistics.mean(churn):.2%}" if any(churn) else ""
        print(f"| {name} | {statistics.mean(values):.2f} ± {deviation:.2f} | {shown} |")
    print(f"\n{time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    sys.exit(main())
