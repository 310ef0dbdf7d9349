"""Zeros that a pass before left in weights, and that training keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook, Moment

KeepZeros = Literal["auto"] | bool

MADE = 0.01
"""Share of exact zeros in a weight that only a mask leaves: trained floats hardly ever hit zero."""


def zeros_to_keep(program: Program, names: Collection[str], keep: KeepZeros) -> dict[str, Tensor]:
    """The places of the zeros that stay, by weight name.

    Only weights of layers with two or more dimensions count: biases and norms often start at
    zero. `auto` keeps all zeros of such weights where at least one of them was masked, which is
    when 1% of it is zero and not all of it: a weight that is zero throughout was initialised so,
    to be trained.

    Args:
        program: before training.
        names: parameters that are trained.
        keep: option `keep_zeros`.
    """
    if keep is False:
        return {}
    weights = {layer.weight for layer in layers(program)} & set(names)
    found = {}
    for name in names:
        if name in weights and program.state[name].dim() > 1:
            zero = program.state[name].detach() == 0
            if bool(zero.any()) and (keep is True or not bool(zero.all())):
                found[name] = zero
    masked = keep is True or any(float(z.float().mean()) >= MADE for z in found.values())
    return found if masked else {}


class ZeroKeeper(Hook):
    """Gives zeros no gradient, so that they count in no norm and no moment, and puts them back
    behind the step."""

    def __init__(self, zeros: Mapping[str, Tensor]) -> None:
        """Takes the places, as boolean masks by parameter name."""
        self.zeros = dict(zeros)

    def after_backward(self, at: Moment) -> None:
        for name, zero in self._here(at).items():
            gradient = at.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(zero, 0.0)

    @torch.no_grad()
    def after_step(self, at: Moment) -> None:
        for name, zero in self._here(at).items():
            at.parameters[name].masked_fill_(zero, 0.0)

    def _here(self, at: Moment) -> dict[str, Tensor]:
        for name, zero in self.zeros.items():
            self.zeros[name] = zero.to(at.parameters[name].device)  # moved once
        return self.zeros
