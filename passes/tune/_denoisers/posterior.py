"""Pairs of neighbouring levels, and the posterior between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.sampling.guidance import over
from graphwright.ir.sampling.schedule import Level


@dataclass(frozen=True)
class Pairs:
    """What goes on between two levels, one pair per sample: x at the noisier, x' at the other.

    Attributes:
        a, s: factors of data and noise at the other level, [batch].
        kept: x = kept x' + added z, with x' = a x0 + s e.
        added: that factor of fresh noise.
    """

    a: Tensor
    s: Tensor
    kept: Tensor
    added: Tensor

    @classmethod
    def of(
        cls, here: Sequence[Level], there: Sequence[Level], device: torch.device | None = None
    ) -> Pairs:
        """Those of the noisier levels `here` and the others `there`."""
        rows = []
        for noisy, other in zip(here, there, strict=True):
            kept = noisy.a / other.a
            added = max(noisy.s**2 - (kept * other.s) ** 2, 0.0) ** 0.5
            rows.append([other.a, other.s, kept, added])
        table = torch.tensor(rows, dtype=torch.float64).to(device)
        return cls(*table.unbind(1))

    def drawn(self, data: Tensor, noise: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """(x', x) of data, all [batch, ...]: x' by `noise`, and x from it by `fresh`."""
        other = self._over(self.a, data) * data + self._over(self.s, data) * noise
        return other, self._over(self.kept, data) * other + self._over(self.added, data) * fresh

    def posterior(self, data: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x' | x, x0 = data), all [batch, ...].

        With v = (kept s)^2 + added^2 its mean is (kept s^2 x + a added^2 x0) / v, and its variance
        s^2 added^2 / v. A step of ancestral sampling (`euler` with eta = 1) is the same.

        Source: Ho et al. 2020, equation 7, for any a and s.
        """
        total = (self.kept * self.s).square() + self.added.square()
        of_x = self._over(self.kept * self.s.square() / total, x)
        of_data = self._over(self.a * self.added.square() / total, x)
        spread = self._over(self.s * self.added / total.sqrt(), x)
        return of_x * x + of_data * data + spread * noise

    def _over(self, factors: Tensor, x: Tensor) -> Tensor:
        return over(factors, x).to(x.dtype)
