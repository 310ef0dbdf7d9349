"""Perturbed styles: means and deviations of channels, moved where it hurts most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.ir.tune.reversal import reverse_gradient
from graphwright.passes.insert._form.scopes import scope_output

EPSILON = 1e-6


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, C, 1, 1) of every sample's channels over height and width."""
    return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + EPSILON).sqrt()


def over_batch(values: Tensor) -> Tensor:
    """Deviation (1, C, 1, 1) of a statistic over the batch."""
    return (values.var(0, keepdim=True) + EPSILON).sqrt()


def restyled(x: Tensor, mean_noise: Tensor, deviation_noise: Tensor) -> Tensor:
    """x with its statistics moved by the two (B, C, 1, 1)."""
    mean, deviation = statistics(x)
    return (x - mean) / deviation * (deviation + deviation_noise) + mean + mean_noise


class Style:
    """The perturbation at one place, as a call of the training graph.

    Attributes:
        mean, deviation: learned scales (1, C, 1, 1) of the noise on the two statistics.
        is_set: whether the scales have been set from a first batch.
    """

    def __init__(self, name: str, channels: int, methods: Sequence[str], factor: float) -> None:
        self.__name__ = f"style_{name.replace('.', '_')}"
        self.methods = tuple(methods)
        self.factor = factor
        self.mean = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))
        self.deviation = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))
        self.is_set = False

    def __call__(self, x: Tensor) -> Tensor:
        method = self.methods[int(torch.randint(len(self.methods), ()))]
        if method == "none":
            return x
        if x.shape[0] < 2:
            raise ArgumentError(
                "insert.style_perturb needs batches of two samples or more",
                fix="Set the training data's batch_size, and a number of samples that it divides.",
            )
        mean, deviation = statistics(x)
        noises = [torch.randn_like(mean) for _ in range(2)]
        if method == "batch":
            return restyled(x, noises[0] * over_batch(mean), noises[1] * over_batch(deviation))
        if not self.is_set:
            self._set(mean, deviation)
        scales = [reverse_gradient(scale, self.factor) for scale in (self.mean, self.deviation)]
        return restyled(x, *(noise * scale for noise, scale in zip(noises, scales, strict=True)))

    @torch.no_grad()
    def _set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(over_batch(mean))
        self.deviation.copy_(over_batch(deviation))
        self.is_set = True


class StyleHook(Hook):
    """Puts the perturbations into the training graph, and moves their scales up the loss.

    The scales take a plain gradient step of the optimizer's learning rate, without momentum and
    decay, in the same step as the network.
    """

    def __init__(self, styles: Mapping[str, Style]) -> None:
        self.styles = dict(styles)
        self._taken: dict[str, Tensor] = {}

    def own(self) -> Mapping[str, nn.Parameter]:
        return {
            f"style_perturb.{name}.{part}": getattr(style, part)
            for name, style in self.styles.items() for part in ("mean", "deviation")
        }  # fmt: skip

    def on_graph(self, graph: fx.Graph) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ArgumentError(
                "insert.style_perturb sets its scales from one process's first batch",
                fix="Train in one process.",
            )
        for name, style in self.styles.items():
            node = scope_output(graph, name)
            if node is None:
                raise ModelError(f"insert.style_perturb: the module {name!r} has no one output now")
            with graph.inserting_after(node):
                new = graph.call_function(style, (node,))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            new.args = (node,)

    def before_step(self, at: Moment) -> None:
        for name, parameter in self.own().items():
            if parameter.grad is not None:
                self._taken[name], parameter.grad = parameter.grad, None

    @torch.no_grad()
    def after_step(self, at: Moment) -> None:
        rate = at.optimizer.param_groups[0]["lr"]
        for name, parameter in self.own().items():
            if name in self._taken:
                parameter.sub_(rate * self._taken[name])
        self._taken.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"set": [name for name, style in self.styles.items() if style.is_set]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, style in self.styles.items():
            style.is_set = name in state["set"]
