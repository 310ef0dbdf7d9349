"""Inverse of the damped empirical Fisher from m gradients, never formed: M-FAC.

F = damp I + (1/m) sum_i g_i g_i^T over d values. The paper's vectors and denominators,

    v_i = g_i / damp - sum_{j<i} ((v_j . g_i) / D_j) v_j,    D_i = m + g_i . v_i,

give F^-1 = I / damp - sum_i v_i v_i^T / D_i. Every v_i is a combination of g_1 ... g_i: v = B g.
With the gradients' products S = G G^T and the Cholesky factor L of S / damp + m I, which the
recursion computes row by row, D_i = L_ii^2 and B = diag(L) L^-1 / damp. So G is kept as it is, all
that is small is in float64, and every product is one pass over G.

Source: Frantar, Kurtic, Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", section 3.1 (static), section 3.2 (dynamic), with their blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError

PAGE = 1 << 19
"""Values of all gradients together that are widened to float64 at a time: 4 MiB stay in cache."""


def coefficients(products: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """B and D of the recursion.

    Args:
        products: (..., m, m) float64, S = G G^T.
        damp: lambda, positive.

    Returns:
        B (..., m, m), lower triangular, v = B g; and D (..., m).
    """
    m = products.shape[-1]
    eye = torch.eye(m, dtype=products.dtype, device=products.device)
    lower = torch.linalg.cholesky(products / damp + m * eye)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return diagonal[..., :, None] * inverse / damp, diagonal.square()


class Fisher:
    """The static algorithm, for the whole vector or for blocks of it.

    Memory beside the gradients is m^2 and a page; B of a block is computed when it is needed.

    Args:
        gradients: (m, d) floating point; read, not written. May be memory-mapped.
        damp: lambda, positive.
        block: length of the consecutive blocks that F is restricted to (the last is shorter);
            None for the full matrix.

    Attributes:
        whole: B (1, m, m) and D (1, m) of the full matrix; None with blocks.

    Raises:
        ArgumentError: there is no gradient, or one is not finite.
    """

    def __init__(self, gradients: Tensor, damp: float = 1e-5, block: int | None = None) -> None:
        m, d = gradients.shape
        if m == 0 or d == 0:
            raise ArgumentError(f"an empirical Fisher of {m} gradients of {d} values")
        self.gradients, self.damp = gradients, damp
        self.block = d if block is None or block >= d else block
        self.whole: tuple[Tensor, Tensor] | None = None
        if self.block == d:
            products = torch.zeros(1, m, m, dtype=torch.float64, device=gradients.device)
            for _, page in self._pages():
                products += page @ page.mT
            self.whole = self._coefficients(products)

    @property
    def size(self) -> int:
        """d."""
        return int(self.gradients.shape[1])

    def _pages(self, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """(values, their gradients (blocks, m, length) in float64, zeros behind the last).

        A page of the full matrix is a part of its one block, a multiple of `multiple` long.
        """
        m, d = self.gradients.shape
        unit = multiple if self.block == d else self.block
        step = max(1, PAGE // (m * unit)) * unit
        for start in range(0, d, step):
            where = slice(start, min(start + step, d))
            page = self.gradients[:, where].double()
            if self.block == d:
                yield where, page[None]
                continue
            padded = torch.nn.functional.pad(page, (0, -page.shape[1] % self.block))
            yield where, padded.reshape(m, -1, self.block).transpose(0, 1)

    def _coefficients(self, products: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(torch.isfinite(products).all()):
            raise ArgumentError("a gradient holds NaN or infinity",
                                fix="Check the data, and the model on it.")  # fmt: skip
        return coefficients(products, self.damp)

    def _of(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) of a page's blocks."""
        return self.whole or self._coefficients(page @ page.mT)

    def vectors(self, multiple: int = 1) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(values, v (blocks, m, length), D (blocks, m)) page by page.

        Args:
            multiple: pages of the full matrix are a multiple of this long.
        """
        for where, page in self._pages(multiple):
            b, d = self._of(page)
            yield where, b @ page, d

    def product(self, x: Tensor) -> Tensor:
        """F^-1 x = x / damp - sum_i ((v_i . x) / D_i) v_i, for x (d,); float64."""
        x = x.double()
        found = x / self.damp
        inner = None
        if self.whole is not None:
            inner = torch.zeros(1, self.gradients.shape[0], 1).to(x)
            for where, page in self._pages():
                inner += page @ _laid_out(x[where], page)
        for where, page in self._pages():
            b, d = self._of(page)
            along = page @ _laid_out(x[where], page) if inner is None else inner
            mixed = b.mT @ ((b @ along) / d[..., None])
            change = (page.mT @ mixed).flatten()
            found[where] -= change[: found[where].numel()]
        return found

    def diagonal(self) -> Tensor:
        """[F^-1]_kk = 1 / damp - sum_i v_ik^2 / D_i, for every k; (d,) float64."""
        found = torch.empty(self.size, dtype=torch.float64, device=self.gradients.device)
        for where, v, d in self.vectors():
            sums = (v.square() / d[..., None]).sum(1).flatten()
            found[where] = 1 / self.damp - sums[: found[where].numel()]
        return found

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[F^-1]_kl for index tensors of one shape; 0 across blocks; float64."""
        k, l = rows.flatten(), columns.flatten()  # noqa: E741  the paper's letters
        found = torch.zeros(k.numel(), dtype=torch.float64, device=self.gradients.device)
        for number in (k // self.block).unique().tolist():
            start = number * self.block
            inside = ((k // self.block == number) & (l // self.block == number)).nonzero()[:, 0]
            page = self.gradients[:, start : start + self.block].double()
            b, d = (part[0] for part in self._of(page[None]))
            left, right = b @ page[:, k[inside] - start], b @ page[:, l[inside] - start]
            same = torch.where(k[inside] == l[inside], 1 / self.damp, 0.0).double()
            found[inside] = same - (left * right / d[:, None]).sum(0)
        return found.reshape(rows.shape)

    def diagonal_blocks(self, length: int) -> Tensor:
        """[F^-1]_QQ of consecutive sets Q of values; (d / length, length, length) float64.

        Args:
            length: of a set; it divides d, and the block length where there are blocks.

        Raises:
            ArgumentError: it does not.
        """
        if self.size % length or (self.whole is None and self.block % length):
            raise ArgumentError(f"sets of {length} do not divide {self.size} values in blocks of "
                                f"{self.block}")  # fmt: skip
        found = []
        for where, v, d in self.vectors(length):
            scaled = v / d.sqrt()[..., None]
            sets = scaled.unflatten(2, (-1, length)).permute(0, 2, 3, 1)  # (blocks, sets, Q, m)
            sets = sets.flatten(0, 1)[: (where.stop - where.start) // length]
            eye = torch.eye(length).to(sets)
            found.append(eye / self.damp - sets @ sets.mT)
        return torch.cat(found)


def _laid_out(x: Tensor, page: Tensor) -> Tensor:
    """Values of a page as (blocks, length, 1), zeros behind."""
    spare = page.shape[0] * page.shape[2] - x.numel()
    return torch.nn.functional.pad(x, (0, spare)).reshape(page.shape[0], page.shape[2], 1)


class Window:
    """The dynamic algorithm: the inverse Fisher of the last m gradients.

    Until m were added, the rest of the window is zeros, which count in m.

    Args:
        size: values of a gradient.
        count: m, gradients in the window.
        damp: lambda, positive.
        dtype, device: of the stored gradients; their products are float64.
    """

    def __init__(
        self,
        size: int,
        count: int,
        damp: float = 1e-5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.damp = damp
        self.gradients = torch.zeros(count, size, dtype=dtype, device=device)
        self.products = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.added = 0

    @property
    def nbytes(self) -> int:
        """Memory of the gradients."""
        return self.gradients.numel() * self.gradients.element_size()

    def add(self, gradient: Tensor) -> None:
        """Replaces the oldest gradient; one row and column of S change."""
        row = self.added % self.gradients.shape[0]
        self.gradients[row] = gradient
        inner = self._inner(self.gradients[row])
        self.products[row], self.products[:, row] = inner, inner
        self.added += 1

    def product(self, x: Tensor) -> Tensor:
        """F^-1 x for x (size,), in its dtype.

        With A = S / damp + m I, the sum of the recursion's rank-one terms is G^T A^-1 G / damp^2.
        """
        m = self.gradients.shape[0]
        eye = torch.eye(m, dtype=torch.float64, device=x.device)
        lower = torch.linalg.cholesky(self.products / self.damp + m * eye)
        mixed = torch.cholesky_solve(self._inner(x)[:, None], lower)[:, 0] / self.damp
        found = torch.empty_like(x)
        step = max(1, PAGE // m)
        for start in range(0, x.numel(), step):
            page = slice(start, start + step)
            # x and the sum nearly cancel where gradients are large: rounded once, at the end
            gap = x[page].double() - self.gradients[:, page].double().T @ mixed
            found[page] = (gap / self.damp).to(x.dtype)
        return found

    def _inner(self, x: Tensor) -> Tensor:
        """G x in float64, page by page."""
        total = torch.zeros(self.gradients.shape[0], dtype=torch.float64, device=x.device)
        step = max(1, PAGE // len(total))
        for start in range(0, x.numel(), step):
            page = slice(start, start + step)
            # float64 from the start: the products nearly cancel in the inverse
            total += self.gradients[:, page].double() @ x[page].double()
        return total
