"""Small denoisers as programs: random nets, and the analytic mixture with labels."""

from __future__ import annotations

from typing import Any

import torch
from models.mixture import mixture
from torch import Tensor, nn

import graphwright as gw


class ConvDenoiser(nn.Module):
    """Images, a step and a label: convolutions with an embedding, one skip."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.label = nn.Embedding(classes + 1, width)
        self.time = nn.Linear(1, width)
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        at = self.time(timestep[:, None] / 1000) + self.label(label)
        first = torch.relu(self.first(sample) + at[:, :, None, None])
        deep = torch.relu(self.norm(self.down(first)))
        deep = deep + torch.relu(self.middle(deep))
        return self.last(torch.cat([first, self.up(deep)], 1))


def conv(classes: int = 4, size: int = 8) -> gw.Program:
    """ConvDenoiser, traced with a free batch; the label after the last stands for none."""
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 2, size, size),
        "timestep": torch.tensor([500.0, 100.0]),
        "label": torch.tensor([0, 2]),
    }
    free = {name: {0: "batch"} for name in inputs}
    ranges = {"label": (0, classes + 1), "timestep": (0, 1000)}
    return gw.trace(ConvDenoiser(classes).eval(), inputs, free, ranges=ranges)


def conv_denoiser(**options: Any) -> gw.Program:
    """It behind sample.denoiser."""
    given = {"unconditional": {"label": 4}, **options}
    return gw.passes.sample.Denoiser(**given)(conv())


class LabelledMixture(nn.Module):
    """The oracle as a network of edm levels: sample [batch, 2], sigma [batch], label [batch].

    A label names the component; 3 is the whole mixture. Returns the noise at a = 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.oracle = mixture(torch.float32)
        weights = torch.cat([torch.eye(3), self.oracle.weights[None].float()])
        self.register_buffer("logs", weights.clamp_min(1e-30).log())

    def forward(self, sample: Tensor, sigma_in: Tensor, label: Tensor) -> Tensor:
        s = sigma_in[:, None]
        data = self.oracle.denoised(sample, torch.ones_like(s), s, self.logs[label])
        return (sample - data) / s


def labelled() -> gw.Program:
    """LabelledMixture behind sample.denoiser."""
    inputs = {
        "sample": torch.randn(4, 2),
        "sigma_in": torch.tensor([0.3, 1.0, 4.0, 9.0]),
        "label": torch.tensor([0, 1, 2, 0]),
    }
    free = {name: {0: "batch"} for name in inputs}
    ranges = {"label": (0, 4), "sigma_in": (0.1, 10.0)}
    program = gw.trace(LabelledMixture().eval(), inputs, free, ranges=ranges)
    schedule = {"kind": "edm", "sigma_min": 0.05, "sigma_max": 10.0, "time": "sigma"}
    grid = {"spacing": "log_snr"}
    return gw.passes.sample.Denoiser(
        parameterization="epsilon", schedule=schedule, grid=grid, unconditional={"label": 3}
    )(program)
