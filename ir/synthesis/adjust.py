"""P72: a teacher of its own for every batch of images, a little way from the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.synthesis.options import WeightAdjust
from graphwright.ir.synthesis.statistics import Observed

TINY = 1e-12


def adjusted(
    observed: Observed, images: Tensor, labels: Tensor, options: WeightAdjust
) -> dict[str, Tensor]:
    """Parameters moved up the cross entropy of a batch of images; the given ones stay.

    K times: theta <- theta + (rho / K) g / (||g|| + 1e-12), with the norm over all parameters.

    Args:
        observed: the model.
        images: (batch, channels, height, width).
        labels: (batch,), classes.
        options: rho, and K.

    Source: P72. Its released code never takes the displacement back, so that batches on one model
    add theirs up; here every batch starts from the model, as the paper has it.
    """
    moved: Mapping[str, Tensor] = observed.parameters
    for _ in range(options.steps):
        leaves = {n: p.clone().requires_grad_(p.is_floating_point()) for n, p in moved.items()}
        loss = F.cross_entropy(observed(images, leaves)[0], labels)
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
        gradients = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        length = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
        step = options.rho / options.steps / (float(length) + TINY)
        moved = {
            name: leaf.detach() + step * gradients[name] if name in gradients else leaf.detach()
            for name, leaf in leaves.items()
        }
    return dict(moved)
