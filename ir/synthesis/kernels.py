"""P12's bidirectional losses, as a score of made images beside a reference set."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6
"""What is added to the diagonal of a kernel, as a share of its mean diagonal."""


def forward_losses(features: Tensor, outputs: Tensor, made: Tensor, targets: Tensor) -> Tensor:
    """How far each made sample's output is from what the reference set predicts of its features.

    (phi K alpha - y)^2 with K = Phi^T, alpha = (Phi Phi^T + beta I)^-1 Y, beta = 1e-6 tr / n.

    Args:
        features: (n, d), Phi of the reference set. outputs: (n, k), Y.
        made: (m, d), phi of every made sample. targets: (m, k), y.

    Returns:
        (m,), mean over the k outputs, float64.

    Source: P12, L_fwd; there k is 1 and the target of a design is 10 standard deviations.
    """
    features, outputs, made, targets = (t.double() for t in (features, outputs, made, targets))
    kernel = features @ features.T
    ridge = RIDGE * float(kernel.diagonal().mean())
    identity = torch.eye(len(kernel), dtype=torch.float64)
    alpha = torch.linalg.solve(kernel + ridge * identity, outputs)
    losses: Tensor = (made @ features.T @ alpha - targets).square().mean(1)
    return losses


def backward_losses(features: Tensor, outputs: Tensor, made: Tensor, targets: Tensor) -> Tensor:
    """How far the reference set's outputs are from what each made sample alone predicts of them.

    mean_i (Phi_i phi^T (phi phi^T + b)^-1 y - Y_i)^2, b = 1e-6 phi phi^T; arguments and result as
    for `forward_losses`.

    Source: P12, L_bwd, which keeps a design inside of the data.
    """
    features, outputs, made, targets = (t.double() for t in (features, outputs, made, targets))
    lengths = made.square().sum(1).clamp_min(1e-300) * (1 + RIDGE)
    weights = (made @ features.T) / lengths[:, None]
    predicted = weights[:, :, None] * targets[:, None, :]
    return (predicted - outputs[None]).square().mean((1, 2))


def bidirectional(
    features: Tensor, outputs: Tensor, made: Tensor, targets: Tensor, gamma: float = 0.5
) -> Tensor:
    """gamma L_fwd + (1 - gamma) L_bwd of every made sample, (m,); less is better.

    Outputs are put in standard deviations from the reference set's mean. P12 moves gamma while it
    optimizes; a score of finished images takes the 0.5 that it starts from.
    """
    mean, std = outputs.double().mean(0), outputs.double().std(0).clamp_min(1e-12)
    known, wanted = (outputs.double() - mean) / std, (targets.double() - mean) / std
    forward = forward_losses(features, known, made, wanted)
    return gamma * forward + (1 - gamma) * backward_losses(features, known, made, wanted)
