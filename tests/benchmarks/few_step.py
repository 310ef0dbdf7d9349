"""Samples of a denoiser of digits in few steps, by solvers and by what recipes train, one table.

    python tests/benchmarks/few_step.py [--seeds 1] [--share 1.0] [RECIPE ...]

Accuracy is of a classifier that was trained on real digits; the distance is Frechet's between its
features of samples and of the held-out images: mean over seeds. Nothing is trained by it. Training
is processor time of one thread, all that came before included; `--share` is of the trainings'
steps. No sample is guided: recipes that learn scales of guidance are asked for scale 1.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from statistics import mean
from typing import Any

import _paths  # noqa: F401
import torch
from models import digit_denoiser, digits
from sampling import features, frechet
from torch import Tensor

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.sampling.sampler import Sampler
from graphwright.passes.registry import find_pass

STEPS = (8, 4, 2, 1)
SAMPLES, BATCH = 500, 64
SCALES = {"scale_min": 1.0, "scale_max": 3.0}
CRITIC = {"width": 32, "lr": 5e-4, "betas": (0.5, 0.9)}
Rounds = Iterator[tuple[gw.Program, int, dict[str, Any]]]
"""A program, the number of its steps, and how it is sampled."""


class Recipes:
    """The recipes by name: each yields its programs, from many steps to few."""

    def __init__(self, seed: int, share: float) -> None:
        """Takes the seed, and the share of the trainings' steps."""
        self.seed, self.share = seed, share
        self.denoiser = digit_denoiser.traced(digit_denoiser.trained())
        x, labels = digit_denoiser.images()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = [order[i : i + BATCH] for i in range(0, len(x) - BATCH + 1, BATCH)]
        self.data = [{"sample": x[rows], "label": labels[rows]} for rows in parts]

    def made(self, name: str, program: gw.Program, count: int, /, **options: Any) -> gw.Program:
        """The program behind a pass that trains so many steps."""
        tune = {**options.pop("tune"), "steps": max(int(count * self.share), 1)}
        chosen = find_pass(name)(**options, tune=tune)
        context = Context(seed=self.seed, training=self.data)
        return chosen.execute(program, context).program

    def dpmpp_2m(self) -> Rounds:
        """The denoiser's own solver."""
        for steps in STEPS:
            yield self.denoiser, steps, {}

    def ddim(self) -> Rounds:
        """The plainest solver."""
        for steps in STEPS:
            yield self.denoiser, steps, {"solver": "ddim"}

    def progressive(self) -> Rounds:
        """P15: guidance first, then half the steps again and again."""
        rate = {"lr": 1e-3, "schedule": "linear"}
        made = self.made("tune.guidance_distill", self.denoiser, 400, **SCALES, tune=rate)
        for steps in STEPS:
            start = {"start": 4 * steps} if steps == STEPS[0] else {}
            made = self.made("tune.progressive", made, 300, steps=steps, tune=rate, **start)
            yield made, steps, {"guidance_scale": 1.0}

    def mmd(self) -> Rounds:
        """P16, by the samples themselves."""
        for steps in STEPS:
            tune = {"optimizer": "adam", "lr": 3e-4, "schedule": "constant", "clip_norm": 0.5}
            yield self.made("tune.mmd", self.denoiser, 150, steps=steps, tune=tune,
                            recompute=False), steps, {}  # fmt: skip

    def f_distill(self) -> Rounds:
        """P26."""
        player = {"lr": 5e-4, "betas": (0.5, 0.9)}
        yield self.made(
            "tune.f_distill", self.denoiser, 1500, fake=player, critic=CRITIC, gan_weight=0.05,
            student_every=3, tune={"lr": 3e-4, "schedule": "constant", "ema": 0.98},
        ), 1, {}  # fmt: skip

    def ddgan(self) -> Rounds:
        """P85."""
        tune = {"optimizer": "adam", "lr": 5e-4, "betas": (0.5, 0.9), "min_lr": 1e-5, "ema": 0.98}
        for steps in STEPS:
            yield self.made("tune.ddgan", self.denoiser, 800, steps=steps, latent=16,
                            latent_width=64, critic=CRITIC, tune=tune), steps, {}  # fmt: skip

    def trajectory(self) -> Rounds:
        """P74: one training for every number of steps."""
        made = self.made(
            "tune.trajectory", self.denoiser, 300, levels=9, guidance_scale=1.0, target_ema=0.98,
            tune={"lr": 5e-4, "schedule": "constant", "ema": 0.98}, **SCALES,
        )  # fmt: skip
        for steps in STEPS:
            yield made, steps, {"guidance_scale": 1.0}


NAMES = {
    "dpmpp_2m": "`dpmpp_2m`, nothing trained",
    "ddim": "`ddim`, nothing trained",
    "progressive": "`tune.guidance_distill`, `tune.progressive` (P15)",
    "mmd": "`tune.mmd` (P16)",
    "f_distill": "`tune.f_distill` (P26)",
    "ddgan": "`tune.ddgan` (P85)",
    "trajectory": "`tune.trajectory` (P74)",
}


def judged(program: gw.Program, steps: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Accuracy in percent and the distance, of samples of a program."""
    judge = digits.trained("resnet")
    real, _ = features(judge, digits.data()[2])
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels: Tensor = torch.arange(SAMPLES) % 10
    made = Sampler.of(program).sample(noise, {"label": labels}, steps=steps, seed=1, **settings)
    found, classes = features(judge, (made.clamp(-1, 1) + 1) / 2)
    return 100 * float((classes == labels).double().mean()), frechet(found, real)


def measured(name: str, seed: int, share: float) -> dict[int, tuple[float, float, float]]:
    """Accuracy, distance and seconds of training by number of steps."""
    found, spent = {}, 0.0
    rounds = getattr(Recipes(seed, share), name)()
    while True:
        begin = time.process_time()
        turn = next(rounds, None)
        if turn is None:
            return found
        own = time.process_time() - begin
        program, steps, settings = turn
        spent = spent + own if name in ("progressive", "trajectory") else own
        found[steps] = (*judged(program, steps, settings), spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| recipe | steps | accuracy | Frechet distance | training s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in given.recipes or NAMES:
        runs = [measured(name, seed, given.share) for seed in range(given.seeds)]
        for steps in sorted(runs[0]):
            right, far, spent = (mean(run[steps][k] for run in runs) for k in range(3))
            trained = f"{spent:.0f}" if spent >= 1 else "-"
            print(f"| {NAMES[name]} | {steps} | {right:.1f} % | {far:.2f} | {trained} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
