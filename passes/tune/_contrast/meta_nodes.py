"""Contrast on a graph whose negatives are sums over clusters instead of all pairs of nodes.

Source: P22 (Hewa Kuruppu et al., "PamC"); its temperature multiplies similarities.
"""

from __future__ import annotations

import torch
from torch import Tensor

INSIDE_LOG = 1e-10
"""Added inside logarithms, as in the released code."""

SMALLEST = 1e-12
"""Norm below which a vector counts as zero, and its cosines as 0."""

ROWS = 1024
"""Rows whose distances are computed at a time."""


def soft_assignment(z: Tensor, centres: Tensor) -> Tensor:
    """q_ik, proportional to 1 / (1 + ||z_i - c_k||^2), with rows that sum to 1.

    Args:
        z: (N, d).
        centres: (K, d).
    """
    near = 1 / (1 + (z[:, None] - centres).square().sum(-1))
    return near / near.sum(1, keepdim=True)


def sharpened(q: Tensor) -> Tensor:
    """p_ik, proportional to q_ik^2 / sum_i q_ik, with rows that sum to 1; no gradient passes."""
    p = q.detach().square() / q.detach().sum(0)
    return p / p.sum(1, keepdim=True)


def neighbours(z: Tensor, count: int) -> Tensor:
    """(N, count): the nearest others of every row, by distance."""
    found = []
    for start in range(0, len(z), ROWS):
        distances = torch.cdist(z[start : start + ROWS], z)
        rows = torch.arange(len(distances), device=z.device)
        distances[rows, rows + start] = torch.inf
        found.append(distances.topk(count, largest=False).indices)
    return torch.cat(found)


def reach(near: Tensor, hops: int) -> Tensor:
    """Edges (2, E) of A + A^2 + ... + A^hops: one for every path of so many steps.

    Args:
        near: (N, count), where A leads to from every node.
        hops: steps at most.
    """
    ends, paths = near, [near]
    for _ in range(hops - 1):
        ends = near[ends].flatten(1)
        paths.append(ends)
    target = torch.cat(paths, 1)
    source = torch.arange(len(near), device=near.device).repeat_interleave(target.shape[1])
    return torch.stack([source, target.flatten()])


def meta_nodes(z: Tensor, assigned: Tensor, clusters: int) -> Tensor:
    """m_k (K, d), the sum of the rows of z that are assigned to cluster k."""
    return z.new_zeros(clusters, z.shape[1]).index_add(0, assigned, z)


def contrast(
    z: Tensor, edges: Tensor, weights: Tensor, assigned: Tensor, clusters: int, tau: float
) -> Tensor:
    """-mean_i log(pos_i + 1e-10) + mean_k log(neg_k + 1e-10), without a matrix of all pairs.

    pos_i is the sum over edges of w_ij exp(tau cos(z_i, z_j)), neg_k the sum over clusters of
    exp(tau cos(m_k, m_l)). The cosine of a node with itself counts as 0.

    Args:
        z: (N, d).
        edges: (2, E), from i to j.
        weights: (E,).
        assigned: (N,), cluster of every node.
        clusters: K.
        tau: factor of the cosines.
    """
    unit = _unit(z)
    source, target = edges
    cosine = (unit[source] * unit[target]).sum(1).masked_fill(source == target, 0.0)
    each = weights.to(z.dtype) * (tau * cosine).exp()
    positive = z.new_zeros(len(z)).index_add(0, source, each)
    centre = _unit(meta_nodes(z, assigned, clusters))
    similar = (centre @ centre.T).masked_fill(
        torch.eye(clusters, dtype=torch.bool, device=z.device), 0.0
    )
    negative = (tau * similar).exp().sum(1)
    return (negative + INSIDE_LOG).log().mean() - (positive + INSIDE_LOG).log().mean()


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay, with a gradient of zero."""
    size = rows.square().sum(1, keepdim=True)
    return rows * torch.where(size > SMALLEST**2, size, 1.0).rsqrt() * (size > SMALLEST**2)
