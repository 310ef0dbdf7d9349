"""P33's discriminator, which tells a student's logits from its teachers'."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.signature import Signature
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.ir.tune.reversal import reverse_gradient
from graphwright.passes.tune._distill.following import Teaching

Mode = Literal["adversarial", "as_released"]


class Discriminator(nn.Module):
    """Linear layers C -> C // K -> C // K^2 -> 2 over rows of logits, with ReLUs between them.

    The released one has a ReLU behind the last layer too, so that its loss is ln(2) / 2 at least.
    """

    def __init__(self, classes: int, reduction: int, last_relu: bool, generator: torch.Generator):
        """
        Args:
            classes: C.
            reduction: K.
            last_relu: whether there is a ReLU behind the last layer.
            generator: of the first weights, uniform in +-1 / sqrt(inputs), as of a 1x1 convolution.
        """
        super().__init__()
        sizes = (classes, classes // reduction, classes // reduction**2, 2)
        made = [nn.utils.skip_init(nn.Linear, a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(made)
        self.last_relu = last_relu
        with torch.no_grad():
            for layer in made:
                for parameter in (layer.weight, layer.bias):
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_((2 * drawn - 1) / layer.weight.shape[1] ** 0.5)

    def forward(self, logits: Tensor) -> Tensor:
        """(rows, C) to (rows, 2)."""
        for number, layer in enumerate(self.layers):
            logits = layer(logits)
            if number < 2 or self.last_relu:
                logits = F.relu(logits)
        return logits


class Judged(Hook):
    """Adds the discriminator's loss, the binary cross entropy of [1, 0] for rows of the student and
    [0, 1] for rows of the teachers' mean logits, and trains it along.

    Adversarial: the student's gradient is turned around, so that it learns to be taken for the
    teachers. As released, both minimize the loss: the student learns to be told apart.

    Source: P33 (Shen & Savvides 2020, "MEAL V2"), section 3.3; `as_released` is its code.
    """

    counts_on_last_step = False

    def __init__(
        self, teaching: Teaching, signature: Signature, classes: int, mode: Mode, reduction: int,
        factor: float, generator: torch.Generator,
    ) -> None:  # fmt: skip
        if classes // reduction**2 < 1:
            raise ModelError(
                f"a discriminator of {classes} logits with reduction {reduction} has a layer of "
                f"{classes} // {reduction}^2 = 0 channels",
                fix=f"Set reduction to {int(classes**0.5)} or less.",
            )
        self.teaching, self.signature, self.factor = teaching, signature, factor
        self.is_adversarial = mode == "adversarial"
        self.net = Discriminator(classes, reduction, not self.is_adversarial, generator)

    def own(self) -> Mapping[str, nn.Parameter]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ArgumentError(
                "tune.distill trains its discriminator in one process",
                fix="Leave out `discriminator`, or start one process.",
            )
        return {f"discriminator.{name}": p for name, p in self.net.named_parameters()}

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        own = wide(main_of(self.signature, outputs))
        theirs = torch.stack(self.teaching(batch).outputs).mean(0)
        mask = batch.get("attention_mask")
        counts = None if mask is None or mask.shape != own.shape[:-1] else mask.bool()
        student, teacher = (t.flatten(0, -2) if counts is None else t[counts]
                            for t in (own, theirs))  # fmt: skip
        return loss + self.factor * self.loss(student, teacher)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss on rows of logits (rows, C) of both."""
        if self.is_adversarial:
            student = reverse_gradient(student)
        dtype = next(self.net.parameters()).dtype
        found = self.net(torch.cat([student, teacher]).to(dtype))
        told = torch.zeros_like(found)
        told[: len(student), 0] = 1
        told[len(student) :, 1] = 1
        return F.binary_cross_entropy_with_logits(found, told)
