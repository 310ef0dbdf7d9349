"""A network in the plane that starts as the exact denoiser of a mixture, and can be trained."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from models.denoisers import LabelledMixture
from models.mixture import mixture
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.sampling.record import FACT, Denoiser

SCHEDULE = {"kind": "edm", "sigma_min": 0.05, "sigma_max": 10.0, "time": "sigma"}
GRID = {"spacing": "karras"}
WHOLE = 3
"""The label of no component."""


class Corrected(nn.Module):
    """E[x0 | x] of LabelledMixture, and a small network on top that is zero at first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.exact = LabelledMixture()
        self.label = nn.Embedding(WHOLE + 1, width)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(2, width)
        self.middle = nn.Linear(width, width)
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, sample: Tensor, sigma_in: Tensor, label: Tensor) -> Tensor:
        s = sigma_in[:, None]
        data = sample - s * self.exact(sample, sigma_in, label)
        angles = s.log() * torch.arange(1, 9, device=s.device) * (math.pi / 8)
        told = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label)
        h = torch.nn.functional.silu(self.enter(sample / (1 + s * s).sqrt()) + told)
        h = h + torch.nn.functional.silu(self.middle(h) + told)
        return data + self.leave(h)


@cache
def network() -> gw.Program:
    """Corrected, traced."""
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(4, 2),
        "sigma_in": torch.tensor([0.3, 1.0, 4.0, 9.0]),
        "label": torch.tensor([0, 1, 2, 0]),
    }
    free = {name: {0: "batch"} for name in inputs}
    ranges = {"label": (0, WHOLE + 1), "sigma_in": (0.1, 10.0)}
    return gw.trace(Corrected().eval(), inputs, free, ranges=ranges)


@cache
def corrected() -> gw.Program:
    """It behind sample.denoiser."""
    made = gw.passes.sample.Denoiser(
        parameterization="x0", schedule=SCHEDULE, grid=GRID, unconditional={"label": WHOLE}
    )
    return made(network())


def otherwise(program: gw.Program, **changes: Any) -> gw.Program:
    """The program with other things said of it."""
    record = Denoiser.required(program, "test").replace(**changes)
    return program.replace(facts={**program.facts, FACT: record.to_json()})


def data(batches: int = 16, size: int = 128, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples of the components, with their labels."""
    g = torch.Generator().manual_seed(seed)
    exact = mixture(torch.float32)
    made = []
    for _ in range(batches):
        label = torch.multinomial(exact.weights, size, replacement=True, generator=g)
        z = torch.randn(size, 2, generator=g)
        sample = exact.means[label] + exact.variances[label, None].sqrt() * z
        made.append({"sample": sample, "label": label})
    return made
