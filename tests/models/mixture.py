"""The analytic denoiser: a mixture of Gaussians, its data in closed form at every level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphwright.ir.sampling.parameterization import canonical, output_of
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.base import Prediction


class Mixture(nn.Module):
    """p(x0) = sum_k w_k N(mean_k, var_k I)."""

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("weights", weights)

    def denoised(
        self, x: Tensor, a: Tensor, s: Tensor, log_weights: Tensor | None = None
    ) -> Tensor:
        """E[x0 | x_t = x]; x [batch, dim], a and s [batch, 1], optional log-weights [batch, k]."""
        spread = a**2 * self.variances + s**2  # [batch, k]
        off = x[:, None] - a[:, :, None] * self.means  # [batch, k, dim]
        logs = self.weights.log() if log_weights is None else log_weights
        logs = logs - (off**2).sum(-1) / (2 * spread) - x.shape[1] / 2 * spread.log()
        share = logs.softmax(-1)
        each = self.means + (a * self.variances / spread)[:, :, None] * off
        return (share[:, :, None] * each).sum(1)

    def log_prob(self, x: Tensor, a: float = 1.0, s: float = 0.0) -> Tensor:
        """log p_t(x), [batch]."""
        spread = a**2 * self.variances + s**2
        off = ((x[:, None] - a * self.means) ** 2).sum(-1)
        logs = self.weights.log() - off / (2 * spread)
        return (logs - x.shape[1] / 2 * (2 * math.pi * spread).log()).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of the data, [n, dim]."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.variances[which, None].sqrt() * z

    def asked(self, kind: str):
        """A denoiser for solvers that goes through a parameterization and back."""

        def denoise(x: Tensor, level: Level) -> Prediction:
            a = torch.full((len(x), 1), level.a, dtype=x.dtype)
            s = torch.full((len(x), 1), level.s, dtype=x.dtype)
            out = output_of(kind, self.denoised(x, a, s), x, a, s)
            return Prediction(*canonical(kind, out, x, a, s))

        return denoise


def mixture(dtype: torch.dtype = torch.float64) -> Mixture:
    """Three unequal components in the plane."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=dtype)
    return Mixture(
        means,
        torch.tensor([0.09, 0.16, 0.25], dtype=dtype),
        torch.tensor([0.5, 0.3, 0.2], dtype=dtype),
    )
