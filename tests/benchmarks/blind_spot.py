"""Denoisers that never saw a clean image, on scikit-learn's two photographs.

    python tests/benchmarks/blind_spot.py [--seeds 3] [--first 0] [--steps 200]

Patches of the luminance of the left two thirds of the pictures, with noise of deviation 25/255:
independent from pixel to pixel, or smoothed over 3 x 3 pixels and brought to the same deviation.
Every row trains one small network (two branches, 3 x 3 and 5 x 5 first) from fresh weights for the
same number of optimizer steps; a step of `tune.blind_spot` runs it three times, of `cyclic` on all
sub-images. N2V replaces 2% of the pixels by a neighbour and learns these. Prints PSNR in dB on
patches of the right third, mean and standard deviation over seeds (of weights, data order and
noise).
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
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.tune import Hook, Moment, OwnLoss, tune
from graphwright.passes.insert.blind_spot import BlindSpot as InsertBlindSpot
from graphwright.passes.tune._images.sub_images import join, split
from graphwright.passes.tune.blind_spot import BlindSpot
from graphwright.passes.tune.finetune import Finetune

PATCH, HELD_OUT, BATCH, WIDTH, SIGMA = 40, 80, 4, 16, 25 / 255
TUNE = {"optimizer": "adam", "lr": 2e-3}


class Net(nn.Module):
    """Two branches of dilatable convolutions between pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, WIDTH, 1)
        self.first = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, k, padding=k // 2) for k in (3, 5))
        self.deep = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(WIDTH, WIDTH, 1)) for _ in range(2)
        )  # fmt: skip
        self.out = nn.Sequential(nn.Conv2d(2 * WIDTH, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x - 0.5))
        found = []
        for first, deep in zip(self.first, self.deep, strict=True):
            y = F.relu(first(x))
            found.append(F.relu(y + deep(y)))
        return self.out(torch.cat(found, 1)) + 0.5


class Masking(Hook):
    """Noise2Void: some pixels are replaced by a neighbour, and learned from the rest."""

    def on_batch(self, at: Moment, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"]
        self.clean, self.mask = x, torch.rand_like(x) < 0.02
        down, right = (int(v) for v in torch.tensor([(0, 1), (1, 0), (0, -1), (-1, 0), (1, 1)])
                       [torch.randint(5, ())])  # fmt: skip
        return {"x": torch.where(self.mask, x.roll((down, right), (2, 3)), x)}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Any) -> Tensor:
        return F.mse_loss(outputs[self.mask], self.clean[self.mask])


def photographs() -> tuple[Tensor, Tensor]:
    """Clean patches (n, 1, 40, 40) to train on and held-out ones (m, 1, 80, 80)."""
    from sklearn.datasets import load_sample_images

    found = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    grey = (found.float() / 255) @ torch.tensor([0.299, 0.587, 0.114])
    edge = grey.shape[2] * 2 // 3
    return _cut(grey[..., :edge], PATCH), _cut(grey[..., edge:], HELD_OUT)


def _cut(grey: Tensor, side: int) -> Tensor:
    return grey.unfold(1, side, side).unfold(2, side, side).reshape(-1, 1, side, side).contiguous()


def noise(shape: torch.Size, smooth: bool, generator: torch.Generator) -> Tensor:
    """Of deviation SIGMA."""
    drawn = torch.randn(shape[0], 1, shape[2] + 2, shape[3] + 2, generator=generator)
    if not smooth:
        return SIGMA * drawn[:, :, 1:-1, 1:-1]
    line = torch.tensor([1.0, 2, 1])
    kernel = line.outer(line)
    return SIGMA * F.conv2d(drawn, (kernel / kernel.norm())[None, None])


def psnr(shown: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise ratio in dB, for a peak of 1."""
    return -10 * math.log10(float((shown.clamp(0, 1) - wanted).square().mean()))


def one_seed(seed: int, steps: int, smooth: bool) -> dict[str, float]:
    """PSNR by the name of the row."""
    clean, held_out = photographs()
    generator = torch.Generator().manual_seed(seed)
    noisy = clean + noise(clean.shape, smooth, generator)
    shown = held_out + noise(held_out.shape, smooth, generator)
    torch.manual_seed(seed)
    free = {"x": {0: "batch", 2: "height", 3: "width"}}
    plain = gw.trace(Net().eval(), (noisy[:2],), free)
    blind = InsertBlindSpot()(plain, check=False)
    order = torch.randperm(len(noisy), generator=generator)[: len(noisy) // BATCH * BATCH]
    alone = [(noisy[rows],) for rows in order.split(BATCH)]
    pairs = [(noisy[rows], clean[rows]) for rows in order.split(BATCH)]
    whole = {**TUNE, "steps": steps}
    context = Context(training=alone, seed=seed)
    found = {"noisy input": psnr(shown, held_out)}
    masked = tune(plain, alone, OwnLoss(**whole), context, hooks=[Masking()]).program  # type: ignore[arg-type]
    stride = 5 if smooth else 2
    with_blind = BlindSpot(stride=stride, tune=whole).execute(blind, context).program
    cyclic = BlindSpot(loss="cyclic", stride=stride, tune=whole).execute(blind, context).program
    labelled = Context(training=pairs, seed=seed)
    supervised = Finetune(tune={**whole, "loss": "mse"}).execute(plain, labelled).program
    with torch.no_grad():
        found["N2V-style masking"] = psnr(masked(shown), held_out)
        found[f"`tune.blind_spot: {{stride: {stride}}}`"] = psnr(with_blind(shown), held_out)
        parts = join(cyclic(split(shown, 2)), 2)
        found[f"`tune.blind_spot: {{loss: cyclic, stride: {stride}}}`, on four sub-images"] = psnr(
            parts, held_out
        )
        found["with clean labels"] = psnr(supervised(shown), held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    print("| noise | row | PSNR dB |\n| --- | --- | ---: |")
    for smooth, name in ((False, "independent"), (True, "over 3 x 3 pixels")):
        numbers = range(given.first, given.first + given.seeds)
        seeds = [one_seed(seed, given.steps, smooth) for seed in numbers]
        for row in seeds[0]:
            values = [found[row] for found in seeds]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"| {name} | {row} | {statistics.mean(values):.2f} ± {deviation:.2f} |")
            sys.stdout.flush()
    print(f"\n{time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    sys.exit(main())
