"""Reductions, scans, sorting with ties, and indexing."""

from __future__ import annotations

import torch
from sweep.cases import Theme, With, bools, ints, positive, real, ties, unit
from torch import Tensor, nn

reductions = Theme("reductions")
reductions.functions(
    {
        "sum over the free axis": lambda x: x.sum(0),
        "sum of all": lambda x: x.sum(),
        "sum of bools": lambda x: (x > 0).sum(1),
        "sum to float64": lambda x: x.sum(1, dtype=torch.float64),
        "mean of all": lambda x: x.mean() + x,
        "mean over a tuple": lambda x: x.mean((0, 2), keepdim=True),
        "nansum": lambda x: torch.nansum(x.sqrt(), 1),
        "nanmean": lambda x: torch.nanmean(x.sqrt(), 1),
        "prod": lambda x: x.prod(2),
        "amax over a tuple": lambda x: x.amax((1, 2)),
        "aminmax": lambda x: torch.aminmax(x, dim=1),
        "max with indices": lambda x: x.max(2),
        "min with indices, kept": lambda x: x.min(1, keepdim=True),
        "argmax of all": lambda x: x.argmax() + x,
        "argmin over the free axis": lambda x: x.argmin(0),
        "std": lambda x: x.std(1),
        "std without correction over the free axis": lambda x: x.std(0, unbiased=False),
        "var with correction 2": lambda x: x.var((1, 2), correction=2),
        "var_mean": lambda x: torch.var_mean(x, dim=(1, 2)),
        "std_mean": lambda x: torch.std_mean(x, dim=2, keepdim=True),
        "norm": lambda x: x.norm(dim=1),
        "norm of all": lambda x: torch.linalg.norm(x) + x,
        "norm of order 3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        "norm of order inf": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
        "norm of order 0": lambda x: torch.linalg.vector_norm(x.relu(), 0, dim=1),
        "norm of matrices": lambda x: torch.linalg.matrix_norm(x),
        "norm of matrices of order 1": lambda x: torch.linalg.matrix_norm(x, 1),
        "logsumexp": lambda x: (x * 50).logsumexp((1, 2)),
        "cumsum": lambda x: x.cumsum(1),
        "cumsum over the free axis": lambda x: x.cumsum(0),
        "cumsum of bools": lambda x: (x > 0).cumsum(2),
        "cumprod": lambda x: x.cumprod(2),
        "cummax": lambda x: x.cummax(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "count_nonzero": lambda x: torch.count_nonzero(x > 0, dim=1),
        "any and all": lambda x: (x > 1).any(1) & (x < 1).all(1).any(),
        "all over a tuple": lambda x: (x < 2).all(dim=(1, 2)),
        "median of an odd axis": lambda x: x.median(1),
        "median of all": lambda x: x.median() + x,
        "nanmedian": lambda x: x.nanmedian(1)[0],
        "mode": lambda x: x.round().mode(2)[0],
        "quantile": lambda x: torch.quantile(x, 0.3, dim=1),
        "kthvalue": lambda x: torch.kthvalue(x, 2, dim=1)[0],
        "trapezoid": lambda x: torch.trapezoid(x, dim=2),
        "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
        "cov": lambda x: torch.cov(x[0]),
        "corrcoef": lambda x: torch.corrcoef(x[0]),
        "cdist": lambda x: torch.cdist(x, x.flip(2)),
        "cdist of order 1": lambda x: torch.cdist(x, x.flip(2), p=1),
        "trace": lambda x: torch.trace(x[0, :, :3]) + x,
        "logdet of a sum": lambda x: torch.logdet(x @ x.mT + 9 * torch.eye(3)),
        "inv of a matrix": lambda x: torch.linalg.inv(x @ x.mT + 9 * torch.eye(3)),
        "solve": lambda x: torch.linalg.solve(x @ x.mT + 9 * torch.eye(3), x),
        "diff": lambda x: x.diff(dim=2),
        "diff of order 2": lambda x: x.diff(2, dim=2),
        "gradient": lambda x: torch.gradient(x, dim=2)[0],
    },
    x=real("n", 3, 5),
)
reductions.function("sum of integers", lambda x: x.int().sum(1) + x.sum(), x=ints(9, "n", 5))
reductions.function("mean of integers", lambda x: x.mean(1, dtype=torch.float32), x=ints(9, "n", 5))
reductions.function("amax of integers", lambda x: x.amax(1) - x.amin(0).sum(), x=ints(9, "n", 5))
reductions.function("argmax of bools", lambda x: x.int().argmax(1), x=bools("n", 5))
reductions.function("cumprod of a mask", lambda x: (~x).int().cumprod(1), x=bools("n", 5))

sorting = Theme("sorting with ties")
sorting.functions(
    {
        "sort stable": lambda x: torch.sort(x, dim=-1, stable=True),
        "sort not stable": lambda x: torch.sort(x, dim=-1),
        "sort stable, descending": lambda x: torch.sort(x, dim=-1, stable=True, descending=True),
        "sort descending": lambda x: torch.sort(x, dim=-1, descending=True),
        "sort of a free axis": lambda x: torch.sort(x, dim=0, stable=True),
        "sort of integers": lambda x: torch.sort(x.long(), dim=-1),
        "sort values only": lambda x: torch.sort(x, dim=-1, descending=True)[0],
        "argsort": lambda x: torch.argsort(x, dim=-1),
        "argsort descending": lambda x: torch.argsort(x, dim=-1, descending=True),
        "argsort stable, descending": lambda x: torch.argsort(
            x, dim=-1, stable=True, descending=True
        ),
        "argsort of argsort": lambda x: x.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True),
        "argsort of bools": lambda x: (x > 0).int().argsort(dim=-1, descending=True, stable=True),
        "argmax": lambda x: x.argmax(-1),
        "argmin": lambda x: x.argmin(-1),
        "argmax of all": lambda x: x.argmax(),
        "max with indices": lambda x: x.max(-1),
        "min with indices": lambda x: x.min(0),
        "topk values": lambda x: torch.topk(x, 5, dim=-1)[0],
        "topk indices": lambda x: torch.topk(x, 5, dim=-1)[1],
        "topk smallest": lambda x: torch.topk(x, 5, dim=-1, largest=False)[1],
        "topk of all": lambda x: torch.topk(x, 20, dim=-1)[1],
        "topk gathered": lambda x: x.gather(-1, torch.topk(x, 3, dim=-1)[1]),
        "topk unsorted": lambda x: torch.topk(x, 5, dim=-1, sorted=False)[0].sum(-1),
        "topk as a mask": lambda x: x >= torch.topk(x, 4, dim=-1)[0][..., -1:],
        "msort": torch.msort,
        "cummax": lambda x: x.cummax(-1),
        "cummin": lambda x: x.cummin(-1),
        "kthvalue": lambda x: torch.kthvalue(x, 7, dim=-1)[0],
        "median": lambda x: x.median(-1)[0],
        "searchsorted": lambda x: torch.searchsorted(torch.arange(-2.0, 3.0), x),
        "searchsorted, right": lambda x: torch.searchsorted(torch.arange(-2.0, 3.0), x, right=True),
        "bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
        "unique": lambda x: torch.unique(x),
        "unique_consecutive": lambda x: torch.unique_consecutive(x[0]),
    },
    x=ties("n", 20),
)
sorting.functions(
    {
        "sort of long rows": lambda x: torch.sort(x, dim=-1),
        "argsort of long rows": lambda x: torch.argsort(x, dim=-1, descending=True),
        "topk of long rows": lambda x: torch.topk(x, 40, dim=-1)[1],
    },
    x=ties("n", 400),
)
sorting.functions(
    {
        "sort without ties": lambda x: torch.sort(x, dim=-1),
        "topk without ties": lambda x: torch.topk(x, 3, dim=-1),
        "topk of a free axis": lambda x: torch.topk(x, min(3, x.shape[0]), dim=0),
        "argsort without ties": lambda x: torch.argsort(x, dim=-1, descending=True),
    },
    x=real("n", 20),
)

indexing = Theme("indexing")
indexing.functions(
    {
        "boolean of all": lambda x: x[x > 0],
        "boolean of rows": lambda x: x[x[:, 0] > 0],
        "boolean of columns": lambda x: x[:, torch.tensor([True, False, True, False, True, True])],
        "boolean and a column": lambda x: x[x[:, 0] > 0, 2],
        "boolean summed": lambda x: x[x > 0].sum() + x,
        "integers of columns": lambda x: x[:, [0, 3, 3]],
        "integers of rows and columns": lambda x: x[[0, 0, -1], [1, 2, 3]],
        "integers apart": lambda x: x.view(-1, 2, 3)[[0, 0], :, [1, 2]],
        "integers behind": lambda x: x.view(-1, 2, 3)[:, [0, 1], [1, 2]],
        "integers of two dimensions": lambda x: x[:, torch.tensor([[0, 1], [2, 3]])],
        "integers, negative": lambda x: x[:, torch.tensor([-1, -6, 2])],
        "None and ellipsis": lambda x: x[None, ..., 1:, None],
        "negative slices": lambda x: x[:-1, -3:-1] if x.shape[0] > 1 else x[:, -3:-1],
        "steps": lambda x: x[::2, 1::3],
        "gather": lambda x: x.gather(1, x.argsort(1)[:, :3]),
        "gather, narrower index": lambda x: x.gather(1, (x[:, :2] > 0).long()),
        "take": lambda x: torch.take(x, torch.tensor([0, 5, 2])),
        "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), dim=1),
        "index_select of the free axis": lambda x: x.index_select(0, torch.tensor([0, 0])),
        "select, last": lambda x: x.select(0, -1) + x[:, -1:],
        "narrow": lambda x: x.narrow(1, 2, 3),
        "scatter": lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x),
        "scatter of a number": lambda x: torch.zeros_like(x).scatter(1, x.argmax(1)[:, None], 1.0),
        "scatter with larger source": lambda x: x.scatter(1, x.argsort(1)[:, :2], x * 2),
        "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x),
        "scatter_add with larger source": lambda x: x.scatter_add(1, (x[:, :3] > 0).long(), x),
        "scatter_reduce amax": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "amax"),
        "scatter_reduce mean": lambda x: x.scatter_reduce(
            1, (x > 0).long(), x, "mean", include_self=False
        ),
        "scatter_reduce prod": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "prod"),
        "index_add": lambda x: x.index_add(1, torch.tensor([0, 0, 5]), x[:, :3], alpha=2),
        "index_copy": lambda x: x.index_copy(1, torch.tensor([5, 0]), x[:, 1:3]),
        "index_reduce": lambda x: x.index_reduce(1, torch.tensor([0, 0]), x[:, :2], "amax"),
        "index_fill": lambda x: x.index_fill(1, torch.tensor([5, 0]), 0.0),
        "index_put": lambda x: x.index_put((torch.tensor([0]), torch.tensor([2])), x.max()),
        "index_put that adds": lambda x: x.index_put(
            (torch.tensor([0, 0]), torch.tensor([2, 2])), x.max(), accumulate=True
        ),
        "index_put by a mask": lambda x: x.index_put((x > 0,), torch.tensor(2.0)),
        "masked_scatter": lambda x: x.masked_scatter(x > 0, x.flip(1)),
        "nonzero": lambda x: torch.nonzero(x > 0),
        "nonzero as a tuple": lambda x: x[torch.nonzero(x > 0, as_tuple=True)] * 2,
        "argwhere": lambda x: torch.argwhere(x > 0),
        "where with one argument": lambda x: torch.where(x > 0)[0],
        "select_scatter": lambda x: torch.select_scatter(x, x[:, 0], 1, 3),
        "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2], 1, 1, 5, 2),
        "diagonal_scatter": lambda x: torch.diagonal_scatter(
            x.view(-1, 2, 3), x[:, :2], dim1=1, dim2=2
        ),
        "one_hot": lambda x: nn.functional.one_hot((x[:, 0] > 0).long(), 3),
        "one_hot of unknown width": lambda x: nn.functional.one_hot((x[:, 0] > 0).long()),
    },
    x=real("n", 6),
)


def _grouped(m: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    total = torch.zeros(8, 5).index_add(0, index, x)
    count = torch.zeros(8).index_add(0, index, torch.ones(x.shape[0]))
    return total / count.clamp(min=1)[:, None]


indexing.module(
    "mean of groups", lambda: With(_grouped), x=real("n", 5), index=ints(8, "n"), blames=("index",)
)
indexing.function(
    "edges gathered and scattered",
    lambda x, e: torch.zeros_like(x).index_add(0, e[1], x[e[0]]),
    x=real(6, 5),
    e=ints(6, 2, "n"),
    blames=("index",),
)
indexing.function("bincount", lambda x: torch.bincount(x, minlength=9), x=ints(9, "n"))
indexing.function("bincount of unknown length", torch.bincount, x=ints(9, "n"))
indexing.function(
    "bincount with weights",
    lambda x, w: torch.bincount(x, weights=w, minlength=9),
    x=ints(9, "n"),
    w=positive("n"),
)
indexing.function("histc", lambda x: torch.histc(x, 4, -1.0, 1.0), x=unit("n"))
indexing.function(
    "rows by an index of free length", lambda x, i: x[i], x=real(9, 4), i=ints(9, "n")
)
indexing.function(
    "pairs by indices of free length", lambda x, i, j: x[i, j], x=real(9, 9), i=ints(9, "n"),
    j=ints(9, "n"), blames=("index",),
)  # fmt: skip
indexing.function(
    "last real token", lambda x, length: x[torch.arange(x.shape[0]), length],
    x=real("n", 7, 3), length=ints(7, "n"), blames=("index",),
)  # fmt: skip

THEMES = (reductions, sorting, indexing)
