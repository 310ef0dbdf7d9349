"""Guiders as modules: predictions with and without the condition to one guided (D, E).

The same module is run by tests and put into graphs. All take

    data, other: D with the condition, and of what is led away from; [batch, ...]
    noise, other_noise: E of both
    x: the sample; a, s: its levels, [batch]

and then their parameters (tensors of no dimension) and the tensors that they carry; they return
D and E, the carried tensors for the next call, and what the driver looks at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.sampling.parameterization import canonical, output_of


def over(level: Tensor, x: Tensor) -> Tensor:
    """[batch], or [batch, 2] of a pair, shaped to broadcast over x."""
    return level.reshape(*level.shape, *[1] * (x.dim() - level.dim()))


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Scalar products of samples, [batch, 1, ...]."""
    return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.dim() - 1))


def length(u: Tensor) -> Tensor:
    """Lengths of samples, [batch, 1, ...]; scaled by the largest entry on the way, so that squares
    neither vanish nor overflow."""
    largest = u.abs().flatten(1).amax(1).reshape(-1, *[1] * (u.dim() - 1)).clamp_min(1e-30)
    return largest * dot(u / largest, u / largest).sqrt()


class Cfg(nn.Module):
    """Classifier-free guidance, with the rescaling of Lin et al. 2024 (section 3.4).

    The rescaling brings the standard deviation of the network's own output back to that of the
    conditional one; `rescale` 0 leaves it out.
    """

    def __init__(self, parameterization: str, sigma_data: float, rescale: float) -> None:
        super().__init__()
        self.kind, self.sigma_data, self.rescale = parameterization, sigma_data, rescale

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor, scale: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E)."""
        guided = other + scale * (data - other)
        if not self.rescale:
            return guided, other_noise + scale * (noise - other_noise)
        a, s = over(a, x), over(s, x)
        own, wanted = (output_of(self.kind, d, x, a, s, self.sigma_data) for d in (guided, data))
        factor = self.rescale * _deviation(wanted) / _deviation(own) + (1 - self.rescale)
        return canonical(self.kind, factor * own, x, a, s, self.sigma_data)


def _deviation(u: Tensor) -> Tensor:
    return u.flatten(1).std(1).reshape(-1, *[1] * (u.dim() - 1))


class Apg(nn.Module):
    """Adaptive projected guidance: momentum, a bound on the length, and less of what is parallel.

    Source: P06, algorithm 1, on the denoised predictions.
    """

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor,
        scale: Tensor, eta: Tensor, momentum_factor: Tensor, norm_threshold: Tensor,
        momentum: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E, momentum)."""
        momentum = (data - other) + momentum_factor * momentum
        short = (norm_threshold / length(momentum).clamp_min(1e-30)).clamp_max(1.0)
        update = torch.where(norm_threshold > 0, short, torch.ones_like(short)) * momentum
        unit = data / length(data).clamp_min(1e-30)
        parallel = dot(update, unit) * unit
        guided = data + (scale - 1) * (update - parallel + eta * parallel)
        moved = over(a, x) / over(s, x) * (data - guided)  # so that x = a D + s E again
        return guided, noise + moved, momentum


class CfgPlusPlus(nn.Module):
    """The guided data, and the noise of what is led away from.

    Source: P23, algorithm 2.
    """

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor, scale: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E)."""
        return other + scale * (data - other), other_noise


class Adaptive(nn.Module):
    """Classifier-free guidance, and how alike the two predictions are.

    Source: P41, section 5; `space` is where the cosine is taken, `noise` in the paper.
    """

    def __init__(self, space: str) -> None:
        super().__init__()
        self.space = space

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor, scale: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E, cosine [batch])."""
        pairs: dict[str, Any] = {
            "epsilon": (noise, other_noise),
            "x0": (data, other),
            "velocity": (noise - data, other_noise - other),
        }
        # 0, which ends nothing, where a prediction is all zeros
        one, two = (each / length(each).clamp_min(1e-30) for each in pairs[self.space])
        cosine = dot(one, two).flatten()
        return (
            other + scale * (data - other), other_noise + scale * (noise - other_noise), cosine
        )  # fmt: skip


EXPONENTS = ("exponent", "other_exponent")
"""Parameters of `Weighted`: b and c of p_with^b p_without^c."""


class Weighted(nn.Module):
    """A mixed score, and how fast the log-weight of a particle grows.

    Source: P35; g^2 and the step of time are the driver's.
    """

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor, exponent: Tensor, other_exponent: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E, (|S|^2 - sum b |s|^2) / 2 [batch]).

        In the form (b + c - 1) (b |s|^2 + c |s'|^2) - b c |s - s'|^2: that of the two squares
        loses all digits where the predictions are alike, as most guided ones are.
        """
        mixed = exponent * noise + other_exponent * other_noise
        apart = noise - other_noise
        squares = exponent * dot(noise, noise) + other_exponent * dot(other_noise, other_noise)
        excess = exponent + other_exponent - 1
        rate = (excess * squares - exponent * other_exponent * dot(apart, apart)).flatten()
        rate = rate / (2 * s * s)
        return (x - over(s, x) * mixed) / over(a, x), mixed, rate


class Recorded(nn.Module):
    """Classifier-free guidance that hands out both predictions of noise, for LinearAG (P41)."""

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        x: Tensor, a: Tensor, s: Tensor, scale: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(D, E, E with the condition, E of the other)."""
        guided = other + scale * (data - other)
        # clones: an output of a program is a tensor of its own
        return (guided, other_noise + scale * (noise - other_noise), noise.clone(),
                other_noise.clone())  # fmt: skip
