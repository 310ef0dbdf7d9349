"""UDFC's closed form: how the readers of a layer make up for channels that it lost or had rounded.

A layer's channels are act(X_j a + c_j), with X its filters times the batch norm's gamma / sigma and
c the offsets. After pruning and quantization the kept ones R compute act(Y_i a + e_i). Channel j is
taken to be a mixture sum_i S_ij of them, so that a reader's weights become V_i + ... = sum_j S_ij
V_j. S minimizes

    |X - S^T Y|^2 + l1 |c - S^T e|^2 + l2 |S - S0|^2,

S0 the identity of kept channels, zero for pruned ones: "do nothing". Hence
S = (Y Y^T + l1 e e^T + l2 I)^-1 (Y X^T + l1 e c^T + l2 S0).

The activation is no part of it: coefficients below zero do not pass a ReLU, and small l2 can do
harm. So there are several candidates (l2 on a grid, S >= 0, the diagonal alone, S0 itself), and the
one with the least error on Gaussian inputs is taken: pre-activations with the means and deviations
that the batch norm tells, correlated as the filters are. No data is read.

Another candidate, `features`, is fitted to such activations a and damaged ones d themselves:
S = (E d d^T + l2 I)^-1 (E d a^T + l2 S0). So it sees what the activation does to means.

Source: Bai et al. 2023, "Unified Data-Free Compression: Pruning and Quantization without
Fine-Tuning" (the assumption, the two coefficients, the closed form). The shrinkage towards S0, the
fit to Gaussian activations, the candidates and their choice are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphwright.ir.repair.nonneg import solve_nonneg

Repair = Literal["auto", "features", "ridge", "nonneg", "diagonal", "none"]

GRID = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""l2 that are tried, in units of the mean diagonal of Y Y^T + l1 e e^T."""

SAMPLES = 2048
"""Gaussian inputs that the candidates are compared on."""
PER_CHANNEL = 8
"""Gaussian inputs that `features` is fitted to, for each channel, in whole draws of `SAMPLES`."""


Equations = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Channels:
    """A layer's channels before and after the damage; float64.

    Attributes:
        filters: X (N, k).
        offsets: c (N,).
        deviations: (N,) of the pre-activations X_j a.
        kept: (R,) indices of the channels that are kept, ascending.
        damaged: Y (R, k), their filters now; their offsets are as before.
        means: (N,) of the pre-activations X_j a + c_j; None for those of inputs a of mean zero.
    """

    filters: Tensor
    offsets: Tensor
    deviations: Tensor
    kept: Tensor
    damaged: Tensor
    means: Tensor | None = None

    @property
    def nothing(self) -> Tensor:
        """S0 (R, N)."""
        start = self.filters.new_zeros(len(self.kept), len(self.filters))
        start[torch.arange(len(self.kept)), self.kept] = 1.0
        return start

    @property
    def is_rounded(self) -> bool:
        """Whether kept filters differ from what they were."""
        return not bool(torch.equal(self.damaged, self.filters[self.kept]))


def normal_equations(channels: Channels, l1: float) -> tuple[Tensor, Tensor]:
    """Y Y^T + l1 e e^T (R, R) and Y X^T + l1 e c^T (R, N)."""
    y, e = channels.damaged, channels.offsets[channels.kept]
    left = y @ y.T + l1 * torch.outer(e, e)
    return left, y @ channels.filters.T + l1 * torch.outer(e, channels.offsets)


def ridge(channels: Channels, l1: float, l2: float, equations: Equations | None = None) -> Tensor:
    """S (R, N) for every channel.

    Args:
        channels: before and after.
        l1: weight of the offsets.
        l2: weight of the shrinkage, as it stands in the objective; positive.
        equations: of `normal_equations`, where they are known.
    """
    left, right = equations or normal_equations(channels, l1)
    eye = torch.eye(len(left), dtype=left.dtype, device=left.device)
    found: Tensor = torch.linalg.solve(left + l2 * eye, right + l2 * channels.nothing)
    return found


def diagonal(
    channels: Channels, l1: float, l2: float, equations: Equations | None = None
) -> Tensor:
    """S (R, N) where every kept channel is only scaled, and a pruned one lost."""
    left, right = equations or normal_equations(channels, l1)
    rows = torch.arange(len(left))
    scale = (right[rows, channels.kept] + l2) / (left.diagonal() + l2)
    return channels.nothing * scale[:, None]


def nonneg(channels: Channels, l1: float, l2: float, equations: Equations | None = None) -> Tensor:
    """S (R, N) >= 0 for pruned channels, and the diagonal for kept ones."""
    left, right = equations or normal_equations(channels, l1)
    found = channels.nothing
    if channels.is_rounded:
        found = diagonal(channels, l1, l2, (left, right))
    eye = torch.eye(len(left), dtype=left.dtype, device=left.device)
    gone = pruned(channels)
    found[:, gone] = solve_nonneg(left + l2 * eye, right[:, gone])
    return found


def pruned(channels: Channels) -> Tensor:
    """Indices of the channels that are gone."""
    gone = torch.ones(len(channels.filters), dtype=torch.bool)
    gone[channels.kept.cpu()] = False
    return gone.nonzero()[:, 0]


def candidates(
    channels: Channels, repair: Repair, l1: float, l2: float | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, S) of everything that may be taken; the first is S0.

    Args:
        channels: before and after.
        repair: `auto` for all kinds, or one; `features` are `feature_candidates`.
        l1: weight of the offsets.
        l2: in units of the mean diagonal; None for the whole grid.
    """
    yield "none", channels.nothing
    equations = normal_equations(channels, l1)  # once: at thousands of channels they cost seconds
    unit = float(equations[0].diagonal().mean())
    if repair == "none" or unit == 0.0:
        return
    for share in GRID if l2 is None else (l2,):
        strength = share * unit
        if repair in ("auto", "ridge"):
            mixed = ridge(channels, l1, strength, equations)
            if channels.is_rounded:
                yield f"ridge {share:g}", mixed
                kept = diagonal(channels, l1, strength, equations)
            else:
                kept = channels.nothing
            if len(pruned(channels)):
                gone = pruned(channels)
                only = kept.clone()
                only[:, gone] = mixed[:, gone]
                yield f"ridge {share:g} of pruned channels", only
        if repair in ("auto", "nonneg") and len(pruned(channels)):
            yield f"nonneg {share:g}", nonneg(channels, l1, strength, equations)
        if repair in ("auto", "diagonal") and channels.is_rounded:
            yield f"diagonal {share:g}", diagonal(channels, l1, strength, equations)


def feature_candidates(
    channels: Channels,
    activation: Callable[[Tensor], Tensor],
    l2: float | None,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """(name, S) fitted to Gaussian activations; kept channels that are not rounded stay.

    Args:
        channels: before and after.
        activation: of the channels, elementwise.
        l2: in units of the mean square of the damaged activations; None for the whole grid.
        generator: of the Gaussian inputs, other ones than those of `choose`.
    """
    draws = -(-PER_CHANNEL * len(channels.filters) // SAMPLES)
    left = right = channels.filters.new_zeros(())
    for _ in range(max(1, draws)):  # never more than one draw of activations in memory
        whole, damaged = gaussian_activations(channels, activation, generator)
        left, right = left + damaged.T @ damaged, right + damaged.T @ whole
    count = max(1, draws) * SAMPLES
    left, right = left / count, right / count
    unit = float(left.diagonal().mean())
    if unit == 0.0:
        return
    eye = torch.eye(len(left), dtype=left.dtype, device=left.device)
    for share in GRID if l2 is None else (l2,):
        strength = share * unit
        mixture = torch.linalg.solve(left + strength * eye, right + strength * channels.nothing)
        if not channels.is_rounded:
            mixture[:, channels.kept] = eye
        yield f"features {share:g}", mixture


@dataclass(frozen=True)
class Choice:
    """The repair that was taken: its name, S, and the relative error on Gaussian inputs without and
    with it."""

    name: str
    mixture: Tensor
    before: float
    after: float


def choose(
    channels: Channels,
    readers: Tensor,
    activation: Callable[[Tensor], Tensor],
    found: Iterable[tuple[str, Tensor]],
    generator: torch.Generator,
    *,
    take_last: bool = False,
) -> Choice:
    """The candidate with the least error in front of the readers.

    Args:
        channels: before and after.
        readers: (N, N), sum of V_i . V_j over all weights that read channels i and j.
        activation: of the channels, elementwise.
        found: candidates, S0 first.
        generator: of the Gaussian inputs.
        take_last: the last candidate is taken, whatever its error.
    """
    whole, rounded = gaussian_activations(channels, activation, generator)
    size = float(((whole @ readers) * whole).sum())
    best: Choice | None = None
    for name, mixture in found:
        gap = whole - rounded @ mixture
        error = float(((gap @ readers) * gap).sum())
        error = (error / size) ** 0.5 if size > 0 else 0.0
        first = error if best is None else best.before
        if best is None or take_last or error < best.after:
            best = Choice(name, mixture, first, error)
    assert best is not None
    return best


def gaussian_activations(
    channels: Channels,
    activation: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    count: int = SAMPLES,
) -> tuple[Tensor, Tensor]:
    """Activations of all channels (count, N) and of the damaged ones (count, R) on one white noise.

    Every pre-activation has the mean and the deviation that are given.
    """
    draws = torch.randn(count, channels.filters.shape[1], generator=generator)
    x = draws.to(channels.filters)
    norms = channels.filters.norm(dim=1)
    scale = torch.where(norms > 0, channels.deviations / norms.clamp_min(1e-30), 0.0)
    means = channels.offsets if channels.means is None else channels.means
    whole = activation(x @ channels.filters.T * scale + means)
    kept = channels.kept
    rounded = activation(x @ channels.damaged.T * scale[kept] + means[kept])
    return whole, rounded
