"""P55's acceptance of made samples: a Metropolis-Hastings chain with a discriminator's odds."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError

LEAST = 1e-6
"""Probabilities are kept so far from 0 and 1: their odds are divided by."""

FOLDS = 5
PENALTY = 1.0
"""Weight of the squared coefficients of the discriminator, on standardized features."""


def accepted(start: float, probabilities: Tensor, generator: torch.Generator) -> list[int]:
    """The states of a chain that begins at a real sample and is offered made ones in order.

    A sample is taken with probability min(1, (1 / D(current) - 1) / (1 / D(offered) - 1)); else the
    chain stays where it is. Its states are then distributed as real samples.

    Args:
        start: D of the real sample that it begins with.
        probabilities: (samples,), D of the made ones: the probability that they are real.
        generator: of the draws.

    Returns:
        Per offer the index of the sample that the chain is at, -1 as long as that is the real one.

    Source: Turner et al. 2019, "Metropolis-Hastings Generative Adversarial Networks", which P55
    builds on.
    """
    odds = (1 / probabilities.double().clamp(LEAST, 1 - LEAST) - 1).tolist()
    drawn = torch.rand(len(odds), generator=generator, dtype=torch.float64).tolist()
    current, state = 1 / min(max(start, LEAST), 1 - LEAST) - 1, -1
    found = []
    for index, (offered, draw) in enumerate(zip(odds, drawn, strict=True)):
        if draw < current / offered:
            current, state = offered, index
        found.append(state)
    return found


def discriminator(real: Tensor, made: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Calibrated probabilities that samples are real: logistic regression on features.

    Every sample is judged by a fit that has not seen it (5 folds), and the judgements of all are
    put on one scale by another logistic regression (Platt 1999). Real and made samples count the
    same, whatever their numbers.

    Args:
        real: (n, features). made: (m, features).
        generator: of the folds.

    Returns:
        D of the real samples (n,) and of the made ones (m,), float64.

    Raises:
        ModelError: fewer than 5 of either, or every probability is 0 or 1.
    """
    if min(len(real), len(made)) < FOLDS:
        raise ModelError(
            f"filter: metropolis_hastings takes {FOLDS} real and {FOLDS} made images at least, and "
            f"these are {len(real)} and {len(made)}"
        )
    rows = torch.cat([real, made]).double()
    rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-12)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    truth = (torch.arange(len(rows)) < len(real)).double()
    weight = torch.where(truth > 0, 0.5 / len(real), 0.5 / len(made)) * len(rows)
    folds = torch.cat([torch.randperm(len(part), generator=generator) % FOLDS
                       for part in (real, made)])  # fmt: skip
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for fold in range(FOLDS):
        seen = folds != fold
        fit = logistic(rows[seen], truth[seen], weight[seen], PENALTY)
        scores[~seen] = rows[~seen] @ fit
    scaled = torch.stack([scores, torch.ones_like(scores)], 1)
    found = (scaled @ logistic(scaled, truth, weight, 1e-3)).sigmoid()
    if bool(((found <= LEAST) | (found >= 1 - LEAST)).all()):
        raise ModelError(
            "filter: metropolis_hastings needs a discriminator that doubts, and this one tells made"
            " from real images for certain: no acceptance follows from that",
            fix="Make images with more iterations, or use filter: agreement.",
        )
    return found[: len(real)], found[len(real) :]


def logistic(rows: Tensor, truth: Tensor, weight: Tensor, penalty: float) -> Tensor:
    """Coefficients (features,) of a weighted logistic regression, by Newton's method.

    Least sum_i w_i log(1 + exp(-t_i x_i b)) + penalty / 2 ||b||^2, t_i = +-1; float64.
    """
    size = rows.shape[1]
    found = torch.zeros(size, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    for _ in range(100):
        chance = (rows @ found).sigmoid()
        gradient = rows.T @ (weight * (chance - truth)) + penalty * found
        curvature = rows.T @ (rows * (weight * chance * (1 - chance))[:, None])
        step = torch.linalg.solve(curvature + penalty * identity, gradient)
        # far from the solution a full step may overshoot: no coefficient moves by more than 5
        step = step / max(1.0, float(step.abs().max()) / 5)
        found = found - step
        if float(step.abs().max()) < 1e-9:
            break
    return found
