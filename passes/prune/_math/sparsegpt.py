"""SparseGPT of one matrix: columns are pruned in turn, and what is lost is spread over the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.passes.prune._masks.patterns import Pattern

BLOCK = 128
"""Columns whose mask is chosen together, and whose updates of later columns are collected."""


def score(w: Tensor, upper: Tensor, dead: Tensor | None = None) -> Tensor:
    """w^2 / U_jj^2: what pruning an entry costs when the columns behind it make up for it.

    Args:
        w: (rows, columns).
        upper: (columns, columns), upper Cholesky factor of the damped Hessian's inverse.
        dead: (columns,) boolean, inputs that were always zero; they cost nothing.

    Source: Frantar & Alistarh 2023, "SparseGPT", equation 3 over the inverse that is left at j.
    """
    cost = (w / upper.diagonal()).square()
    return cost if dead is None else cost.masked_fill(dead, 0.0)


def prune_matrix(
    w: Tensor,
    upper: Tensor,
    pattern: Pattern,
    *,
    dead: Tensor | None = None,
    keep: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The pruned matrix with updated weights, and its mask.

    An unstructured mask is chosen block by block, over all rows of the block together, from the
    weights as the blocks before have left them; an N:M mask group by group. Each pruned column's
    error is pushed onto the columns behind it: at once inside the block, and by one product per
    block beyond.

    Args:
        w: (rows, columns) float32 or float64; not changed.
        upper, dead: see `score`.
        pattern: what the mask has to look like.
        keep: a mask (rows, columns) to reconstruct for, instead of choosing one.
        block: columns to a block; rounded down to whole groups of an N:M pattern.

    Returns:
        (rows, columns) with exact zeros, and the boolean mask of what stays.

    Source: Frantar & Alistarh 2023, "SparseGPT", algorithm 1.
    """
    rows, columns = w.shape
    if pattern.m:
        block = max(1, block // pattern.m) * pattern.m
    # One row per column of w: what the loop reads and writes lies together in memory.
    work = w.T.clone(memory_format=torch.contiguous_format)
    kept = torch.ones_like(work, dtype=torch.bool) if keep is None else keep.T.contiguous()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        inner = upper[start:end, start:end]
        gone = None if dead is None else dead[start:end]
        if keep is None and not pattern.m:
            share = Pattern(
                (pattern.count(end * rows) - pattern.count(start * rows)) / ((end - start) * rows)
            )
            cost = score(work[start:end].T, inner, gone)
            kept[start:end] = share.keep(cost, "layer").T
        errors = torch.empty_like(work[start:end])
        for i in range(end - start):
            at = start + i
            if keep is None and pattern.m and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                ahead = None if gone is None else gone[group]
                cost = score(work[at : at + pattern.m].T, inner[group, group], ahead)
                kept[at : at + pattern.m] = pattern.keep(cost).T
            lost = work[at].masked_fill(kept[at], 0.0)
            work[at] -= lost
            errors[i] = lost / inner[i, i]
            work[at + 1 : end].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return work.T.contiguous(), kept.T.contiguous()
