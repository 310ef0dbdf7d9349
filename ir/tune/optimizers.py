"""Update rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from graphwright.ir.tune.adagrad import AdaGradNorm
from graphwright.ir.tune.mfac import MfacOptimizer
from graphwright.ir.tune.options import TuneOptions

MakeOptimizer = Callable[[Mapping[str, nn.Parameter], TuneOptions], torch.optim.Optimizer]
"""A recipe's own optimizer: from parameters by name and the options."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], options: TuneOptions, masked: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer that the options name; only matrices and kernels decay.

    Args:
        parameters: to train, by name.
        options: rule and rates.
        masked: parameters whose zeros stay, which `mfac` then leaves out of its Fisher matrix.
    """
    if options.optimizer == "mfac":
        return _mfac(parameters, options, masked)
    decayed = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((decayed, options.weight_decay), (others, 0.0))
        if chosen
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    if options.optimizer == "adagrad":
        return torch.optim.Adagrad(groups, lr=options.lr)
    if options.optimizer == "adagrad_norm":
        return AdaGradNorm(groups, options.lr)
    adam = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, lr=options.lr, betas=options.betas)


def _mfac(
    parameters: Mapping[str, nn.Parameter], options: TuneOptions, masked: Collection[str]
) -> MfacOptimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p], "sparse": name in masked,
         "weight_decay": options.weight_decay if p.dim() > 1 else 0.0}
        for name, p in parameters.items()
    ]  # fmt: skip
    return MfacOptimizer(
        groups, options.lr, options.momentum,
        gradients=options.fisher_gradients, damp=options.fisher_damp,
    )  # fmt: skip
