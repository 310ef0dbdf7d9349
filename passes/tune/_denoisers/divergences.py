"""f-divergences of a teacher from a student, and the weights of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal[
    "reverse_kl", "kl", "js", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"
]

SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}
"""h(r) = f''(r) r^2 of D_f = E_student f(r), with r the teacher's density by the student's.

f is -ln r; r ln r; r ln r - (1 + r) ln((1 + r) / 2); (1 + r) ln((1 + r) / (2 r)); 1 - sqrt r;
(r - 1) ln r; (1 - r)^2 / r.

Source: P26 (Xu et al. 2025), theorem 1 and table 1; Neyman's is from the released code, which
leaves out the factors (they go when the weights are divided by their mean).
"""

LARGEST_LOGIT = 10.0
"""Logits are cut to this on both sides before the exponential."""

LEAST, MOST = 0.1, 20.0
"""Ratios are cut to this."""

TINY = 1e-6
"""Added to means that are divided by."""


class Ratios:
    """Ratios of densities out of a discriminator's logits, of mean one at every noise level.

    Attributes:
        means: average ratio of each bin of noise levels; zero where none has been seen.
    """

    def __init__(self, bins: int, rate: float, device: torch.device) -> None:
        """
        Args:
            bins: number of equal bins of the times from 0 to 1.
            rate: of the average over steps; 0 has the means of the batch alone.
            device: where they are.
        """
        self.rate = rate
        self.means = torch.zeros(bins, device=device)

    @torch.no_grad()
    def __call__(self, logits: Tensor, times: Tensor) -> Tensor:
        """[batch] ratios; takes in the means of this batch.

        Args:
            logits: [batch] of samples of the student.
            times: [batch] places in the schedule, from 0 to 1.
        """
        found = logits.detach().float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()
        found = found.clamp(LEAST, MOST)
        bins = (times * len(self.means)).long().clamp(0, len(self.means) - 1)
        sums = torch.zeros_like(self.means).index_add_(0, bins, found)
        counts = torch.bincount(bins, minlength=len(self.means))
        seen, fresh = counts > 0, sums / counts.clamp_min(1)
        moved = torch.where(self.means > 0, self.rate * self.means + (1 - self.rate) * fresh, fresh)
        self.means = torch.where(seen, moved, self.means)
        return found / (self.means[bins] + TINY)


def weights(divergence: str, ratios: Tensor) -> Tensor:
    """h(r) by its mean over the batch: [batch]."""
    found = SECOND[divergence](ratios)
    return found / found.mean()


def matched(x: Tensor, teacher: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """A loss whose gradient by x is weight (fake - teacher) / (mean |x - teacher|), per entry.

    Args:
        x: [batch, ...] samples of the student.
        teacher, fake: data that the teacher and the model of the student's samples predict from
            noisy ones.
        weight: [batch].

    Source: P26, equation 9, in the form of Yin et al. 2024 ("DMD2").
    """
    x, teacher, fake = x.float(), teacher.detach().float(), fake.detach().float()
    each = (len(x), *[1] * (x.dim() - 1))
    size = (x.detach() - teacher).abs().flatten(1).mean(1).reshape(each)
    gradient = weight.detach().reshape(each) * (fake - teacher) / (size + TINY)
    return 0.5 * (x - (x.detach() - gradient)).square().mean()
