"""VPTQ of one matrix: vectors of neighbouring rows are looked up, column after column."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.data.kmeans import kmeans, nearest
from graphwright.ir.stored.codebook import Lookup, Vectors, narrow
from graphwright.passes.quantize._math.codebook_fit import fit_codebooks

LAZY = 128
"""Columns whose updates of the columns behind them are collected into one product."""


FIT_DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it where codebooks are fitted at the end."""


@dataclass(frozen=True)
class Size:
    """Of a codebook and its residual: elements of a vector, vectors, vectors of the residual."""

    width: int
    count: int
    residual: int = 0


@dataclass(frozen=True)
class VptqSettings:
    """The stored form of a matrix.

    Attributes:
        main: codebooks of the columns.
        outlier: codebooks of the outlier columns.
        outlier_percent: share of the columns that are outliers: those with the largest H_jj.
        groups: codebooks that the other columns are spread over.
        norm: columns are shifted and scaled to [0, 1] first.
        permute: columns with large H_jj are quantized first.
        iterations, tolerance: of k-means.
        fit_steps: of conjugate gradients on the codebooks at the end.
    """

    main: Size
    outlier: Size
    outlier_percent: float = 0.0
    groups: int = 1
    norm: bool = True
    permute: bool = True
    iterations: int = 100
    tolerance: float = 1e-5
    fit_steps: int = 0


@dataclass
class Stretch:
    """Columns that are stored together, in the order they are quantized; a codebook per group."""

    name: str
    size: Size
    groups: list[Tensor]
    books: list[list[Tensor]]


Factor = Callable[[Tensor], Tensor]
"""H (k, k) to the upper Cholesky factor of the damped H's inverse."""


def quantize(
    w: Tensor, h: Tensor, factor: Factor, settings: VptqSettings, generator: torch.Generator
) -> Vectors:
    """The matrix in codebooks, such that x @ w.T is kept for inputs with H = mean of x x^T.

    All elements of a vector belong to one column and weigh the same in the objective, so that
    the nearest vector is the best one; what it changes in the outputs is made up for by the
    columns behind it. With a residual, its codebooks are fitted to what the main ones leave over
    at the time a column is quantized, and the columns are run through again from the start.

    A column whose input was always zero counts like the average one. The norm changes what the
    codebooks are fitted to, and not the loop: H scaled by the columns' scales gives the same
    updates. (The released code leaves H unscaled.)

    Args:
        w: (rows, columns) float32; not changed.
        h: (columns, columns) float32.
        factor: see `Factor`.
        settings: sizes of the codebooks, and options.
        generator: draws the starts of k-means.

    Source: Liu et al. 2024, "VPTQ", section 3.
    """
    diagonal = h.diagonal()
    alive = diagonal > 0
    usual = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_ones(())
    importance = torch.where(alive, diagonal, usual)
    scale, shift = column_range(w) if settings.norm else (None, None)
    columns = _Columns(w, scale, shift)
    stretches = partition(importance, settings)
    order = torch.cat([group for stretch in stretches for group in stretch.groups])
    upper = factor(h[order][:, order])
    weight = importance if scale is None else importance * scale.float().square().clamp(min=1e-30)

    def fit(source: Tensor, stretch: Stretch, count: int) -> list[Tensor]:
        return [
            fit_codebook(source[g], weight[g], stretch.size.width, count, settings, generator)
            for g in stretch.groups
        ]  # fmt: skip

    for stretch in stretches:
        stretch.books.append(fit(columns.normal(w), stretch, stretch.size.count))
    found = run(columns, order, upper, stretches)
    if any(stretch.size.residual for stretch in stretches):
        for stretch in stretches:
            if stretch.size.residual:
                stretch.books.append(fit(found.rest, stretch, stretch.size.residual))
        found = run(columns, order, upper, stretches)
    vectors = store(found.index, stretches, scale, shift, w.shape[0])
    if settings.fit_steps:
        spread = h + torch.diag(usual * FIT_DAMPING + (importance - diagonal))
        vectors = fit_codebooks(vectors, w, spread, settings.fit_steps)
    return vectors


def column_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Extent and smallest element of every column, as they are stored."""
    low = w.amin(0)
    return narrow(w.amax(0) - low), narrow(low)


def partition(importance: Tensor, settings: VptqSettings) -> list[Stretch]:
    """Outlier columns and the rest, cut into equal groups.

    As many outliers as `outlier_percent` says, and more where the rest would not divide.
    """
    total = len(importance)
    by_size = torch.argsort(importance, descending=True, stable=True)
    outliers = math.ceil(settings.outlier_percent * total / 100)
    groups = max(1, min(settings.groups, total - outliers))
    outliers += (total - outliers) % groups
    first, rest = by_size[:outliers], by_size[outliers:]
    if not settings.permute:
        rest = rest.sort().values
    found = []
    if outliers:
        found.append(Stretch("outlier", settings.outlier, [first], []))
    if len(rest):
        found.append(Stretch("main", settings.main, list(rest.chunk(groups)), []))
    return found


class _Columns:
    """Columns of the matrix as codebooks see them: one row each, shifted, scaled and filled up."""

    def __init__(self, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
        self.matrix = w
        ones = w.new_ones(w.shape[1])
        wide = ones if scale is None else scale.float()
        self.scale = wide
        # A column of equal elements is its shift, whatever is looked up.
        self.divisor = torch.where(wide > 0, wide, ones)
        self.shift = ones * 0 if shift is None else shift.float()

    def normal(self, w: Tensor) -> Tensor:
        """(columns, rows)."""
        return ((w - self.shift) / self.divisor).T.contiguous()


def fit_codebook(
    columns: Tensor, weight: Tensor, width: int, count: int, settings: VptqSettings,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """(k, width): weighted k-means of the vectors of some columns (c, rows); k <= count.

    Every vector weighs as its column does (c,).
    """
    vectors = as_vectors(columns, width)
    each = weight.repeat_interleave(len(vectors) // len(weight))
    each = each / each.mean()
    found = kmeans(vectors, each, count, generator, settings.iterations, settings.tolerance)
    return narrow(found.centroids).float()


def as_vectors(columns: Tensor, width: int) -> Tensor:
    """(c * ceil(rows / width), width) of columns (c, rows), filled up with zeros."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % width)).reshape(-1, width)


@dataclass(frozen=True)
class Found:
    """Result of one run through the columns.

    Attributes:
        index: for each column of the matrix, the indices into its codebooks, one after another.
        rest: (columns, rows), what the codebooks left over of each column as it then was.
    """

    index: list[list[Tensor]]
    rest: Tensor


def run(columns: _Columns, order: Tensor, upper: Tensor, stretches: Sequence[Stretch]) -> Found:
    """Looks up the columns in order, each with what the errors before it have made of it."""
    total, rows = len(order), columns.matrix.shape[0]
    chains = _chains(stretches, total)
    work = columns.matrix.T[order].contiguous()
    rest = torch.zeros_like(work)
    index: list[list[Tensor]] = [[] for _ in range(total)]
    names = order.tolist()
    for start in range(0, total, LAZY):
        end = min(start + LAZY, total)
        errors, block = torch.empty_like(work[start:end]), upper[start:end, start:end]
        for i in range(end - start):
            column, x = names[start + i], work[start + i]
            scale, shift = columns.scale[column], columns.shift[column]
            normal = (x - shift) / columns.divisor[column]
            index[column], value = encode(normal, chains[column])
            rest[column] = normal - value[:rows]
            error = errors[i] = (x - (value[:rows] * scale + shift)) / block[i, i]
            work[start + i + 1 : end].addr_(block[i, i + 1 :], error, alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return Found(index, rest)


def _chains(stretches: Sequence[Stretch], total: int) -> list[list[Tensor]]:
    """For every column the codebooks that it is looked up in, one after another."""
    found: list[list[Tensor]] = [[] for _ in range(total)]
    for stretch in stretches:
        for place, group in enumerate(stretch.groups):
            books = [level[place] for level in stretch.books]
            for column in group.tolist():
                found[column] = books
    return found


def encode(x: Tensor, books: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Greedy indices of a column, and what they stand for, filled up to whole vectors."""
    width = books[0].shape[1]
    rest = as_vectors(x[None], width)
    found, value = [], torch.zeros_like(rest)
    for book in books:
        index = nearest(rest, book)
        chosen = book[index]
        found.append(index)
        value, rest = value + chosen, rest - chosen
    return found, value.reshape(-1)


def store(
    index: list[list[Tensor]],
    stretches: Sequence[Stretch],
    scale: Tensor | None,
    shift: Tensor | None,
    rows: int,
) -> Vectors:
    """The stored form. Columns of one group stand in their own order, whatever it was."""
    groups = [group.sort().values for stretch in stretches for group in stretch.groups]
    order = torch.cat(groups)
    parts: dict[str, list[Lookup]] = {}
    for stretch in stretches:
        columns = [c for group in stretch.groups for c in group.sort().values.tolist()]
        parts[stretch.name] = []
        for level, books in enumerate(stretch.books):
            table = torch.stack([index[column][level] for column in columns], 1)
            parts[stretch.name].append(Lookup.of(table.cpu(), _stack(books).cpu(), rows))
    as_they_stand = torch.equal(order, torch.arange(len(order), device=order.device))
    places = None if as_they_stand else torch.argsort(order).to(torch.int32).cpu()
    return Vectors(
        parts,
        places,
        None if scale is None else scale.cpu(),
        None if shift is None else shift.cpu(),
    )


def _stack(books: Sequence[Tensor]) -> Tensor:
    """(groups, k, width) as stored; smaller codebooks are filled up with zeros."""
    most = max(len(book) for book in books)
    filled = [torch.nn.functional.pad(book, (0, 0, 0, most - len(book))) for book in books]
    return narrow(torch.stack(filled))
