"""The contrast of an image with better and with worse ones, on features of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Features = Sequence[Tensor]
"""Of a batch of images: (batch, channels, height, width) of every layer."""

LEAST = 3e-7
"""Least mean distance from the negatives that is divided by."""


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over channels of two feature maps, a mean over positions.

    Args:
        a, b: (batch, channels, height, width).

    Returns:
        (batch,).
    """
    return F.cosine_similarity(a, b, dim=1).mean((1, 2))


def cross_entropy_contrast(
    made: Features, better: Sequence[Features], worse: Sequence[Features]
) -> Tensor:
    """-log of the share of a positive among itself and all negatives, by exp(similarity).

    There is no temperature. A mean over layers, positives and samples.

    Args:
        made: features of the images in question.
        better: features of the positives.
        worse: features of the negatives.

    Source: P31, as in the released code of its loss on features of VGG.
    """
    losses = []
    for layer, own in enumerate(made):
        negative = torch.stack([similarity(own, other[layer]) for other in worse], 1)
        for other in better:
            logits = torch.cat([similarity(own, other[layer])[:, None], negative], 1)
            losses.append((logits.logsumexp(1) - logits[:, 0]).mean())
    return torch.stack(losses).mean()


def ratio_contrast(made: Features, better: Sequence[Features], worse: Sequence[Features]) -> Tensor:
    """Mean absolute distance from a positive over that from the negatives, which is a mean of them.

    A mean over layers, positives and samples; arguments as of `cross_entropy_contrast`.

    Source: `InfoNCE_L1` of P31's released code, which stops at a second positive.
    """
    losses = []
    for layer, own in enumerate(made):
        negative = torch.stack([_distance(own, other[layer]) for other in worse]).mean(0)
        negative = negative.clamp_min(LEAST)
        losses += [(_distance(own, other[layer]) / negative).mean() for other in better]
    return torch.stack(losses).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean((1, 2, 3))
