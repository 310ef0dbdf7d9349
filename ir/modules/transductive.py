"""The transductive heads of P53: a batch is labelled together, over a graph of its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ABSENT, SELF = 16.0, 32.0
"""Distances that stand for no neighbour and for the sample itself: beyond the 4 that unit vectors
are apart at most, and within float16."""


def affinity(z: Tensor, neighbours: int) -> Tensor:
    """The symmetric graph of nearest neighbours.

    Args:
        z: (N, D), rows of length 1.
        neighbours: how many each sample has; all others where there are fewer.

    Returns:
        (N, N): the mean of the two directions, so 1 for neighbours of each other and 0.5 where one
        alone has the other. Samples that are equally far are all neighbours; none is its own.
    """
    square = z.square().sum(1)
    distance = square[:, None] + square[None] - 2 * z @ z.mT
    index = torch.arange(z.shape[0], device=z.device)
    distance = torch.where(index[:, None] == index[None], SELF, distance)
    padded = torch.cat([distance, distance.new_full((z.shape[0], neighbours), ABSENT)], 1)
    farthest = padded.topk(neighbours, dim=1, largest=False).values[:, -1:]
    near = ((distance <= farthest) & (distance < ABSENT / 2)).to(z.dtype)
    return (near + near.mT) / 2


class LogitAssignment(nn.Module):
    """Features (N, D) and logits (N, K) to scores (N, K), whose softmax is the assignment.

    Y = softmax(logits), then `steps` times scores = logits + weight W Y and Y = softmax(scores),
    with W the `affinity` of the normalized features. Every step is the minimum of a bound on
    E = sum(Y log Y - Y logits) - weight / 2 tr(Y^T W Y).

    Args:
        neighbours: of a sample.
        weight: of the Laplacian term; 0 gives the logits.
        steps: number of updates.
    """

    def __init__(self, neighbours: int, weight: float, steps: int) -> None:
        super().__init__()
        self.neighbours, self.weight, self.steps = neighbours, weight, steps

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        graph = affinity(F.normalize(features), self.neighbours)
        scores = logits
        for _ in range(self.steps):
            scores = logits + self.weight * (graph @ scores.softmax(1))
        return scores


class PrototypeAssignment(nn.Module):
    """Features (N, D) to scores (N, K), whose softmax is the assignment to prototypes.

    z are the features less `mean`, at length 1; the unary cost is a_pk = sharpness |z_p - c_k|^2.
    Updates are those of `LogitAssignment` with -a for the logits.

    Args:
        sums: (K, D), of the normalized features of the support by class.
        counts: (K,), samples of the support by class.
        mean: (D,), of the support's features.
        sharpness: factor of the distances.
        refine: whether prototypes are the means of support and batch, by the assignment so far
            (soft K-means); else those of the support alone.
        neighbours, weight, steps: as of `LogitAssignment`.
    """

    sums: Tensor
    counts: Tensor
    mean: Tensor

    def __init__(
        self, sums: Tensor, counts: Tensor, mean: Tensor, *, sharpness: float = 1.0,
        refine: bool = False, neighbours: int = 3, weight: float = 1.0, steps: int = 20,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("mean", mean)
        if refine:
            self.register_buffer("sums", sums)
            self.register_buffer("counts", counts)
        self.register_buffer("prototypes", sums / counts[:, None])
        self.sharpness, self.refine = sharpness, refine
        self.neighbours, self.weight, self.steps = neighbours, weight, steps

    def forward(self, features: Tensor) -> Tensor:
        z = F.normalize(features - self.mean)
        graph = affinity(z, self.neighbours)
        prototypes: Tensor = self.get_buffer("prototypes")
        cost = self._cost(z, prototypes)
        scores = -cost
        for _ in range(self.steps):
            assigned = scores.softmax(1)
            if self.refine:
                total = self.counts + assigned.sum(0)
                cost = self._cost(z, (self.sums + assigned.mT @ z) / total[:, None])
            scores = self.weight * (graph @ assigned) - cost
        return scores

    def _cost(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """(N, K) float: sharpness times the squared distances."""
        square = z.square().sum(1)[:, None] + prototypes.square().sum(1)[None]
        return self.sharpness * (square - 2 * z @ prototypes.mT)
