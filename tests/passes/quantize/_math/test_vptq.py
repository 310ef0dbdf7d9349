from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphwright.ir.calibration.hessian import inverse_factor
from graphwright.ir.data.kmeans import kmeans
from graphwright.ir.ops.codebook import pack_indices, packed_width, unpack_indices
from graphwright.ir.stored.codebook import Vectors, index_bits
from graphwright.passes.quantize._math import vptq
from graphwright.passes.quantize._math.codebook_fit import fit_codebooks
from graphwright.passes.quantize._math.vptq import Size, VptqSettings


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int = 0) -> Tensor:
    """Second moments of inputs that lie mostly in a few directions."""
    mix = randn(columns, columns, seed=seed) * torch.logspace(0, -2, columns)[:, None]
    x = randn(20 * columns, columns, seed=seed + 1) @ mix
    return x.T @ x / len(x)


def factor(h: Tensor) -> Tensor:
    return inverse_factor(h, 0.01)[0]


def sizes(main: Size, **more: object) -> VptqSettings:
    return VptqSettings(**{"main": main, "outlier": Size(2, 16), **more})  # type: ignore[arg-type]


def quantize(w: Tensor, h: Tensor, options: VptqSettings, seed: int = 0) -> Vectors:
    return vptq.quantize(w, h, factor, options, torch.Generator().manual_seed(seed))


def loss(w: Tensor, value: Tensor, h: Tensor) -> float:
    """tr(E H E^T) in float64."""
    e = (value - w).double()
    return float(((e @ h.double()) * e).sum())


# ---- indices


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 16), st.integers(1, 5), st.integers(1, 23), st.integers(0, 2**31))
def test_indices_are_packed_without_loss(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    packed = pack_indices(index, bits)
    assert (
        packed.shape == (rows, math.ceil(columns * bits / 8)) == (rows, packed_width(columns, bits))
    )
    assert torch.equal(unpack_indices(packed, bits, columns), index.int())
    # a string of bits, low bits first
    word = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert [word >> (bits * i) & (2**bits - 1) for i in range(columns)] == index[0].tolist()


def test_an_index_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="index 16 does not fit 4 bits"):
        pack_indices(torch.tensor([[16]]), 4)


# ---- k-means


def test_kmeans_ends_where_centroids_are_weighted_means() -> None:
    x, weight = randn(900, 3), torch.rand(900, generator=torch.Generator().manual_seed(1)) + 0.01
    found = kmeans(x, weight, 12, torch.Generator().manual_seed(0), 500, 0.0)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(found.inertia, found.inertia[1:], strict=False))
    points, centroids, w = (t.double().numpy() for t in (x, found.centroids, weight))
    distance = ((points[:, None] - centroids) ** 2).sum(-1)
    nearest = distance.argmin(1)
    for place in range(12):
        mine = nearest == place
        expected = (points[mine] * w[mine, None]).sum(0) / w[mine].sum()
        np.testing.assert_allclose(centroids[place], expected, atol=1e-5)
    assert (distance.min(1) * w).sum() == pytest.approx(found.inertia[-1], rel=1e-5)


def test_weights_lower_the_weighted_inertia() -> None:
    x = randn(2000, 4)
    weight = torch.logspace(0, -3, 2000)

    def inertia(each: Tensor) -> float:
        means = [kmeans(x, each, 32, torch.Generator().manual_seed(seed)) for seed in range(4)]
        costs = [(torch.cdist(x, m.centroids).amin(1).square() * weight).sum() for m in means]
        return float(sum(costs))

    assert inertia(weight) < 0.9 * inertia(torch.ones(2000))


def test_centroids_without_vectors_are_put_to_use() -> None:
    # all starts but few lie in one clump: the far points must get centroids of their own
    x = torch.cat([randn(500, 2) * 1e-3, torch.tensor([[9.0, 0], [0, 9], [-9, 0], [0, -9]])])
    found = kmeans(x, torch.ones(504), 8, torch.Generator().manual_seed(0))
    assert len(found.centroids) == 8
    assert found.inertia[-1] < 1


def test_as_many_centroids_as_distinct_vectors_are_exact() -> None:
    x = randn(6, 3).repeat(5, 1)
    found = kmeans(x, torch.ones(30), 50, torch.Generator().manual_seed(0))
    assert len(found.centroids) == 6
    assert float(torch.cdist(x, found.centroids).amin(1).max()) < 1e-6


# ---- the column loop


def test_scalars_on_one_grid_are_gptq() -> None:
    """Against the recursion of optimal brain quantization, in float64, without a factor."""
    w, h = randn(12, 20).double(), correlated(20).double()
    grid = torch.linspace(-2.5, 2.5, 16).double()
    stretch = vptq.Stretch("main", Size(1, 16), [torch.arange(20)], [[grid[:, None]]])
    columns = vptq._Columns(w, None, None)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(20)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = vptq.run(columns, torch.arange(20), upper, [stretch])
    rest = w.clone()
    for j in range(20):
        inverse = torch.linalg.inv(damped[j:, j:])
        index = (rest[:, j, None] - grid).abs().argmin(1)
        assert torch.equal(found.index[j][0], index)
        error = (rest[:, j] - grid[index]) / inverse[0, 0]
        rest[:, j:] -= error[:, None] * inverse[0]


def test_as_many_centroids_as_vectors_reproduce_the_matrix() -> None:
    w = randn(4, 6)[torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])].half().float()
    found = quantize(w, correlated(6), sizes(Size(4, 64), norm=False))
    torch.testing.assert_close(found.value(), w, rtol=0, atol=1e-6)


def test_errors_are_made_up_for_by_later_columns() -> None:
    """Less tr(E H E^T) than the nearest entries of the same codebooks, on the mean of seeds."""
    ratios = []
    for seed in range(5):
        w, h = randn(64, 48, seed=seed), correlated(48, seed=seed)
        options = sizes(Size(4, 32))
        spread = quantize(w, h, options, seed)
        alone = vptq.quantize(
            w, h, lambda x: torch.eye(len(x)), options, torch.Generator().manual_seed(seed)
        )
        books = [v.parts["main"][0].codebooks for v in (spread, alone)]
        assert torch.equal(books[0], books[1])
        ratios.append(loss(w, spread.value(), h) / loss(w, alone.value(), h))
    assert sum(ratios) / 5 < 0.7


def test_a_residual_lowers_the_error() -> None:
    w, h = randn(64, 48), correlated(48)
    one = quantize(w, h, sizes(Size(4, 32)))
    two = quantize(w, h, sizes(Size(4, 32, 16)))
    assert torch.equal(one.parts["main"][0].codebooks, two.parts["main"][0].codebooks)
    assert loss(w, two.value(), h) < 0.5 * loss(w, one.value(), h)


def test_the_norm_is_a_scaled_problem() -> None:
    """H scaled by the columns' extents, and the matrix in units of them, give the same indices."""
    w, h = randn(32, 24) * torch.logspace(0, 1, 24), correlated(24)
    options = sizes(Size(4, 16), permute=False)
    found = quantize(w, h, options)
    scale, shift = (t.double() for t in (w.amax(0) - w.amin(0), w.amin(0)))
    assert found.scale is not None
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-3, atol=0)
    scale, shift = found.scale.float(), found.shift.float()  # type: ignore[union-attr]
    normal = (w - shift) / scale
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24)
    upper = torch.linalg.cholesky(
        torch.linalg.inv((damped * scale * scale[:, None]).double()), upper=True
    ).float()
    stretch = vptq.partition(h.diagonal(), options)[0]
    stretch.books = [[found.parts["main"][0].codebooks[0].float()]]
    direct = vptq.run(vptq._Columns(normal, None, None), torch.arange(24), upper, [stretch])
    index = torch.stack([each[0] for each in direct.index], 1)
    assert torch.equal(index.int(), found.parts["main"][0].index())


def test_columns_of_equal_elements_are_exact() -> None:
    w = randn(16, 10)
    w[:, 3], w[:, 7] = 0.5, 0.0
    value = quantize(w, correlated(10), sizes(Size(4, 4), permute=False)).value()
    # the updates of other columns' errors come on top of column 3 and 7 as they were given
    assert float((value[:, 3] - 0.5).std()) == pytest.approx(0, abs=1e-6)
    assert float((value[:, 7]).std()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        sizes(Size(4, 32)),
        sizes(Size(5, 32), permute=False, norm=False),
        sizes(Size(4, 32, 8), outlier_percent=10.0),
        sizes(Size(4, 32), groups=7, permute=False),
        sizes(Size(8, 100, 5), groups=4, outlier_percent=3.0, norm=False),
    ],
    ids=["plain", "padding", "outliers", "groups", "all"],
)
def test_the_stored_form_is_what_was_found(options: VptqSettings) -> None:
    """The value rebuilt from packed storage has the columns in their places, and few bits."""
    w = randn(37, 50)
    found = quantize(w, torch.diag(torch.linspace(1, 2, 50)), options)
    widths = [sum(p.columns for p in found.parts.get(n, [])[:1]) for n in ("outlier", "main")]
    again = Vectors.from_state(found.state(), 37, widths)
    assert torch.equal(again.value(), found.value())
    # of all columns of the matrix, the one that a rebuilt column is nearest to is its own
    nearest = torch.cdist(found.value().T, w.T).argmin(1)
    assert torch.equal(nearest, torch.arange(50))
    expected = 0
    for lookups in found.parts.values():
        for lookup in lookups:
            groups, count, width = lookup.codebooks.shape
            expected += groups * count * width * 2
            rows = math.ceil(37 / width)
            expected += rows * math.ceil(lookup.columns * index_bits(count) / 8)
    expected += 4 * 50 if found.order is not None else 0
    expected += 2 * 2 * 50 if options.norm else 0
    assert found.nbytes == expected


def test_outliers_are_the_columns_with_the_largest_diagonal() -> None:
    importance = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 0])
    options = sizes(Size(4, 8), outlier_percent=15.0, groups=3)
    outliers, rest = vptq.partition(importance, options)
    # two are 15% rounded up; the other eight do not divide by three, so two more
    assert outliers.groups[0].tolist() == [1, 3, 5, 7]
    assert [group.tolist() for group in rest.groups] == [[8, 6], [4, 2], [0, 9]]
    plain = vptq.partition(importance, sizes(Size(4, 8), permute=False))
    assert plain[0].groups[0].tolist() == list(range(10))


# ---- fitting


@pytest.mark.parametrize("norm", [True, False])
def test_fitted_codebooks_are_those_of_least_squares(norm: bool) -> None:
    """Against lstsq on the explicit design matrix, in float64."""
    w, h = randn(18, 12), correlated(12) + torch.eye(12)
    options = sizes(Size(4, 5, 3), outlier_percent=20.0, norm=norm)
    start = quantize(w, h, options)
    fitted = fit_codebooks(start, w, h, 200)
    assert loss(w, fitted.value(), h) <= loss(w, start.value(), h)
    lookups = [(part, i) for part, found in start.parts.items() for i in range(len(found))]
    root = torch.linalg.cholesky(h.double())
    columns = []
    base = _with_books(start, {key: torch.zeros(1) for key in lookups}).value().double()
    for key in lookups:
        books = start.parts[key[0]][key[1]].codebooks
        for place in range(books.numel()):
            unit = torch.zeros(books.numel())
            unit[place] = 1
            zero = {other: torch.zeros(1) for other in lookups}
            moved = _with_books(start, {**zero, key: unit.reshape(books.shape)}).value()
            columns.append(((moved.double() - base) @ root).flatten())
    design, target = torch.stack(columns, 1), ((w.double() - base) @ root).flatten()
    best = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    least = float((design @ best - target[:, None]).square().sum())
    # codebooks are stored in half precision, and the scales multiply that
    assert loss(w, fitted.value(), h) == pytest.approx(least, rel=2e-3)


def _with_books(vectors: Vectors, books: dict[tuple[str, int], Tensor]) -> Vectors:
    from dataclasses import replace

    parts = {
        part: [
            replace(lookup, codebooks=books[part, i].expand(lookup.codebooks.shape).float())
            for i, lookup in enumerate(lookups)
        ]
        for part, lookups in vectors.parts.items()
    }
    return replace(vectors, parts=parts)
