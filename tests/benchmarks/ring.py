"""Modes of a ring of eight Gaussians that a generator covers, with the entropy and without.

python tests/benchmarks/ring.py [steps]
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

import graphwright as gw

MODES = 2 * torch.stack([(torch.arange(8) * math.pi / 4).cos(),
                         (torch.arange(8) * math.pi / 4).sin()], 1)  # fmt: skip
SEEDS = (0, 1, 2)


def batches(size: int = 128, count: int = 32) -> list[dict[str, Tensor]]:
    """Points of the ring, as real samples."""
    g = torch.Generator().manual_seed(0)
    points = MODES[torch.randint(8, (size * count,), generator=g)]
    points = points + 0.05 * torch.randn(points.shape, generator=g)
    return [{"input": torch.zeros(size, 2), "labels": part} for part in points.split(size)]


def generator(seed: int) -> gw.Program:
    """Three layers of 64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    return gw.trace(net.eval(), (torch.randn(4, 2),), {"input": {0: "batch"}})


def covered(made: Tensor) -> tuple[int, float]:
    """Modes with 1% of the samples near them or more, and the share of samples near any."""
    distance = torch.cdist(made, MODES)
    near = distance.amin(1) < 0.3
    counts = torch.bincount(distance.argmin(1)[near], minlength=8)
    return int((counts >= 0.01 * len(made)).sum()), float(near.double().mean())


def main() -> None:
    """Prints the table."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(9))
    print(f"{steps} steps, seeds {SEEDS}: modes of 8, and the share of samples near one\n")
    print("| DLLE, DIsoMap | entropy | modes | near a mode |\n| --- | --- | --- | --- |")
    for regular in (0.0, 1.0):
        for entropy in (0.0, 0.1, 1.0):
            found = []
            for seed in SEEDS:
                recipe = gw.passes.tune.ManifoldEntropy(
                    dlle=regular, disomap=regular, entropy=entropy, generator_every=1,
                    critic={"width": 64, "lr": 1e-3}, tune={
                        "steps": steps, "lr": 1e-3, "betas": (0.5, 0.9), "schedule": "cosine"},
                )  # fmt: skip
                made = recipe(generator(seed), training=batches(), check=False, seed=seed)
                found.append(covered(made(z).detach()))
            modes = ", ".join(str(count) for count, _ in found)
            near = ", ".join(f"{share:.0%}" for _, share in found)
            print(f"| {regular:g} | {entropy:g} | {modes} | {near} |", flush=True)


if __name__ == "__main__":
    main()
