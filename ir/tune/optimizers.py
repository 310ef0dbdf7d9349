"""Update rules and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from graphwright.ir.tune.mfac import MfacOptimizer
from graphwright.ir.tune.options import TuneOptions

MakeOptimizer = Callable[[Mapping[str, nn.Parameter], TuneOptions], torch.optim.Optimizer]
"""A recipe's own optimizer: from parameters by name and the options."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], options: TuneOptions
) -> torch.optim.Optimizer:
    """The optimizer that the options name; only matrices and kernels decay."""
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((decayed, options.weight_decay), (others, 0.0))
        if chosen
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    if options.optimizer == "mfac":
        count, damp = options.fisher_gradients, options.fisher_damp
        return MfacOptimizer(groups, options.lr, options.momentum, gradients=count, damp=damp)
    adam = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, lr=options.lr, betas=options.betas)


def lr_factor(options: TuneOptions, step: int, total: int) -> float:
    """Learning rate of a step as a share of `lr`.

    (step + 1) / warmup while warming up. Then, with t from 0 right after the warm-up to 1 at
    `total`: 1, 1 - t or (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, without restarts).
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)
    if options.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1.0
