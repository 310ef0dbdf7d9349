"""Tucker and CP decompositions of a kernel, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

ROUNDS = 200
"""Rounds of alternating least squares at most."""

SMALLEST_GAIN = 1e-7
"""Change of the relative error below which the rounds end."""


def unfold(w: Tensor, mode: int) -> Tensor:
    """The matrix whose rows run along a mode."""
    return w.movedim(mode, 0).flatten(1)


@dataclass(frozen=True)
class Tucker:
    """W[o, i, ...] ~ sum_pq out[o, p] core[p, q, ...] inner[i, q], both factors orthonormal."""

    out: Tensor
    core: Tensor
    inner: Tensor

    def whole(self) -> Tensor:
        """The kernel that it stands for."""
        return torch.einsum("op,pq...,iq->oi...", self.out, self.core, self.inner)


def tucker(w: Tensor, rank_out: int, rank_in: int) -> Tucker:
    """The Tucker decomposition along the two modes of channels.

    Starts at the leading singular vectors of both unfoldings (HOSVD) and alternates (HOOI, De
    Lathauwer et al. 2000): each factor is the best there is for the other, so the error falls.

    Args:
        w: (out, in, *k).
        rank_out, rank_in: channels of the core.
    """
    w = w.double()
    out, inner = _leading(unfold(w, 0), rank_out), _leading(unfold(w, 1), rank_in)
    whole, before = float(w.square().sum().clamp_min(1e-30)), 2.0
    for _ in range(ROUNDS):
        out = _leading(unfold(torch.einsum("oi...,iq->oq...", w, inner), 0), rank_out)
        inner = _leading(unfold(torch.einsum("oi...,op->pi...", w, out), 1), rank_in)
        core = torch.einsum("oi...,op,iq->pq...", w, out, inner)
        left = max(0.0, 1 - float(core.square().sum()) / whole) ** 0.5
        if before - left < SMALLEST_GAIN:
            break
        before = left
    return Tucker(out, core, inner)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    u: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return u[:, :rank]


def cp(w: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """The factors (size of mode, rank) of W ~ sum_r a_r x b_r x c_r ..., by alternating least
    squares (Kolda and Bader 2009, figure 3.3).

    Starts at the leading singular vectors of the unfoldings, and at random ones where a mode has
    fewer than `rank`. All but the first factor come with columns of length 1.

    Args:
        w: of two modes or more.
        rank: terms of the sum.
        generator: of what is random at the start.
    """
    w = w.double()
    factors = []
    for mode, size in enumerate(w.shape):
        start = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(w.device)
        lead = _leading(unfold(w, mode), rank)
        start[:, : lead.shape[1]] = lead
        factors.append(start)
    whole, before = float(w.norm().clamp_min(1e-30)), float("inf")
    for _ in range(ROUNDS):
        for mode in reversed(range(w.dim())):
            others = [f for m, f in enumerate(factors) if m != mode]
            gram = reduce(torch.mul, (f.t() @ f for f in others))
            ridge = 1e-10 * gram.diagonal().mean() * torch.eye(rank, dtype=w.dtype, device=w.device)
            right = unfold(w, mode) @ _columnwise(others)
            factors[mode] = torch.linalg.solve(gram + ridge, right.t()).t()
            if mode:
                factors[mode] = torch.nn.functional.normalize(factors[mode], dim=0)
        left = float((w - cp_whole(factors)).norm()) / whole
        if before - left < SMALLEST_GAIN:
            break
        before = left
    return factors


def cp_whole(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that factors stand for."""
    flat = factors[0] @ _columnwise(factors[1:]).t()
    return flat.reshape([len(f) for f in factors])


def _columnwise(factors: Sequence[Tensor]) -> Tensor:
    """The Khatri-Rao product: (product of sizes, rank)."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[None]).flatten(0, 1)

    return reduce(pair, factors)
