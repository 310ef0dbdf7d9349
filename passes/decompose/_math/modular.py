"""The closed forms of MoDeGPT: three kinds of pairs of matrices, and the share each block gives.

Weights are (out, in), as layers store them; second moments are means over tokens, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-2
"""Ridge of the leverage scores, as a share of the mean of the diagonal. The paper's 1 is one for
sums over its own number of tokens; a share does not depend on that."""

DAMPING = 1e-6
"""Added to the diagonal of the matrix that is inverted, as a share of its mean."""


def leverage_scores(c: Tensor) -> Tensor:
    """(n,): the diagonal of C (C + lambda I)^-1, in float64.

    Args:
        c: (n, n) second moments.
    """
    c = c.double()
    ridge = RIDGE * float(c.diagonal().mean().clamp_min(1e-30))
    damped = c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)
    return 1 - ridge * torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()


def nystrom(c: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The hidden units that stay, ascending, and the weight that reads them (algorithm 1).

    The weight is the least-squares solution of H_J W'^T = H W^T on the tokens behind C.

    Args:
        c: (n, n) second moments of what enters the down projection.
        down: (out, n) its weight.
        rank: units that stay.

    Returns:
        (rank,) int64, and (out, rank) float64.
    """
    c, down = c.double(), down.double()
    kept = leverage_scores(c).topk(rank).indices.sort().values
    inner = c[kept][:, kept]
    damping = DAMPING * inner.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(
        inner + damping * torch.eye(rank, dtype=c.dtype, device=c.device)
    )
    return kept, torch.cholesky_solve(c[kept] @ down.t(), factor).t()


def channel_moments(weight: Tensor, bias: Tensor | None, c: Tensor, mean: Tensor) -> Tensor:
    """(out,): the mean square of every output of a linear layer, from the moments of its input.

    Args:
        weight: (out, in).
        bias: (out,).
        c: (in, in) second moments.
        mean: (in,).
    """
    w = weight.double()
    found = ((w @ c.double()) * w).sum(-1)
    if bias is not None:
        b = bias.double()
        found = found + 2 * b * (w @ mean.double()) + b.square()
    return found.clamp_min(0)


def column_scores(query: Tensor, key: Tensor, pairs: Tensor | None) -> Tensor:
    """Scores of the channels of one key head (algorithm 2), or of their pairs under rotation.

    Without rotation a channel's score is sum_h C_Q[i, i] C_K[i, i] over the query heads h that
    share the key head: the square of the paper's product of column norms of C^(1/2). A rotation
    mixes two channels, and what is the same at every angle is the sum of their mean squares: so
    the score of a pair is the product of two such sums.

    Args:
        query: (heads, d) mean squares of the queries' channels.
        key: (d,) of the key's.
        pairs: (d / 2, 2) channels that a rotation mixes; None without one.
    """
    if pairs is None:
        return (query * key).sum(0)
    return (query[:, pairs].sum(-1) * key[pairs].sum(-1)).sum(0)


def svd_pair(
    first: Tensor, second: Tensor, root: Tensor, inverse: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The best two factors of rank `rank` in the place of x first^T second^T (algorithm 3).

    With C = R R^T of x, the product first' second' minimizes ||R^T (first^T second^T - ...)||,
    by two thin decompositions. Several second matrices that share the first one stand below each
    other, so that they are approximated together.

    Args:
        first: (d, in).
        second: (out, d).
        root: R, (in, in).
        inverse: R^-1.
        rank: columns that stay.

    Returns:
        first' (rank, in) and second' (out, rank), float64.
    """
    u, s, vh = torch.linalg.svd(root.t() @ first.double().t(), full_matrices=False)
    inner, values, outer = torch.linalg.svd(s[:, None] * (vh @ second.double().t()),
                                            full_matrices=False)  # fmt: skip
    narrow = inverse.t() @ (u @ inner[:, :rank])
    return narrow.t(), (values[:rank, None] * outer[:rank]).t()


def allocate(
    influences: Sequence[float], ratio: float, temperature: float, most: float
) -> list[float]:
    """The share of every block that goes: L ratio softmax(-s / temperature), none above `most`.

    That maximizes sum s (1 - share) + temperature * entropy(share) at the mean `ratio`. What lies
    above `most` is spread over the other blocks in proportion to their weights, until none does.

    Args:
        influences: s, one per block: 1 - mean cosine of what enters and what leaves it.
        ratio: mean share, below `most`.
        temperature: epsilon; the larger, the more even.
        most: share that no block exceeds.
    """
    s = torch.tensor(influences, dtype=torch.float64)
    share, free = torch.zeros_like(s), torch.ones_like(s, dtype=torch.bool)
    for _ in range(len(s)):
        left = ratio * len(s) - float(share[~free].sum())
        share[free] = left * torch.softmax(-s[free] / temperature, 0)
        above = free & (share > most)
        if not bool(above.any()):
            break
        share[above] = most
        free &= ~above
    return [float(each) for each in share]
