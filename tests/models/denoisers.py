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


class TokenDenoiser(nn.Module):
    """Images as 16 tokens of 2 x 2 pixels: attention among them, and one to the label.

    Attributes:
        behind: called on what the attention among tokens gives, heads side by side.
    """

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, width, 2, stride=2)
        self.label, self.time = nn.Embedding(classes + 1, width), nn.Linear(1, width)
        self.place = nn.Parameter(torch.randn(16, width))
        self.own, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.told = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.leave = nn.ConvTranspose2d(width, 2, 2, stride=2)
        self.behind = None

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        h = self.enter(sample).flatten(2).transpose(1, 2) + self.place
        h = h + self.time(timestep[:, None] / 1000)[:, None]
        tokens = self._attend(*self.own(h).chunk(3, -1))
        h = h + self.out(tokens if self.behind is None else self.behind(tokens))
        k, v = self.told(self.label(label)[:, None] + self.place).chunk(2, -1)
        h = h + self._attend(self.query(h), k, v)
        return self.leave(h.transpose(1, 2).unflatten(2, (4, 4)))

    def _attend(self, *parts: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts]
        made = nn.functional.scaled_dot_product_attention(*heads)
        return made.transpose(1, 2).flatten(2)


def token_net() -> TokenDenoiser:
    """TokenDenoiser with the same weights every time."""
    torch.manual_seed(0)
    return TokenDenoiser().eval()


def token() -> gw.Program:
    """It traced with a free batch, as `conv`."""
    like = conv()
    names = [spec.name for spec in like.signature.inputs]
    free = {name: {0: "batch"} for name in names}
    ranges = {"label": (0, 5), "timestep": (0, 1000)}
    inputs = dict(zip(names, like.examples, strict=True))
    return gw.trace(token_net(), inputs, free, ranges=ranges)


def token_denoiser(**options: Any) -> gw.Program:
    """It behind sample.denoiser."""
    given = {"unconditional": {"label": 4}, "grid": {"spacing": "leading"}, **options}
    return gw.passes.sample.Denoiser(**given)(token())


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


SPREAD = 0.01
"""Variance of a spot of `Around`."""


class Around(nn.Module):
    """The noise of a mixture with a spot around every neighbour: [batch, k, 2], in no order."""

    def forward(self, x: Tensor, sigma_in: Tensor, context: Tensor) -> Tensor:
        s = sigma_in[:, None]
        off = x[:, None] - context
        spread = SPREAD + s**2
        share = (-(off**2).sum(-1) / (2 * spread)).softmax(1)[:, :, None]
        data = (share * (context + SPREAD / spread[:, :, None] * off)).sum(1)
        return (x - data) / s


def around() -> gw.Program:
    """It, with a free batch and free neighbours."""
    inputs = {
        "x": torch.randn(3, 2), "sigma_in": torch.tensor([0.3, 1.0, 4.0]),
        "context": torch.randn(3, 4, 2),
    }  # fmt: skip
    free = {"x": {0: "batch"}, "sigma_in": {0: "batch"}, "context": {0: "batch", 1: "tokens"}}
    return gw.trace(Around().eval(), inputs, free, ranges={"sigma_in": (0.1, 10.0)})


RHO = 0.8
"""Correlation of the two pictures of `TwoPictures`."""


class TwoPictures(nn.Module):
    """The noise of two correlated normal numbers, in closed form, at a level of edm for each.

    Both have variance 1 and a mean of 1 with the label 0, of 0 with the label 1.
    """

    def forward(
        self, image: Tensor, depth: Tensor, image_sigma: Tensor, depth_sigma: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        s, t, mean = image_sigma[:, None], depth_sigma[:, None], (1 - label.float())[:, None]
        dx, dy = image - mean, depth - mean
        det = (1 + s**2) * (1 + t**2) - RHO**2
        wx, wy = ((1 + t**2) * dx - RHO * dy) / det, ((1 + s**2) * dy - RHO * dx) / det
        return s * wx, t * wy


def pair() -> gw.Program:
    """It, with a free batch."""
    inputs = {
        "image": torch.randn(3, 1), "depth": torch.randn(3, 1),
        "image_sigma": torch.tensor([0.2, 1.0, 5.0]),
        "depth_sigma": torch.tensor([0.3, 2.0, 1.0]), "label": torch.tensor([0, 1, 0]),
    }  # fmt: skip
    ranges = {"label": (0, 2), "image_sigma": (0.1, 10.0), "depth_sigma": (0.1, 10.0)}
    free = {name: {0: "batch"} for name in inputs}
    return gw.trace(TwoPictures().eval(), inputs, free, ranges=ranges)
