"""Losses of a discriminator and of what it judges; logits are high for what is real."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real) - log(1 - sigmoid(fake)), each a mean over the batch.

    At its least, exp(logit) is p_real / p_fake.

    Args:
        real, fake: logits [batch, ...].

    Source: Goodfellow et al. 2014, "Generative adversarial nets", equation 1.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-log sigmoid(fake), a mean over the batch: the loss that does not saturate.

    Args:
        fake: logits [batch, ...] of what the program made.
    """
    return F.softplus(-fake).mean()


def r1_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """||d logit / d input||^2 of every sample, a mean over the batch; it can be differentiated.

    Args:
        logits: [batch, ...] of real samples, each of its own sample alone.
        inputs: [batch, ...] what they were computed from, in need of a gradient.

    Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?",
    equation 9, without its gamma / 2.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
