"""Trains the networks of a manifold over several widths at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.context import Context
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment
from graphwright.passes.resize._manifold.layout import layouts
from graphwright.passes.resize._manifold.manifold import Manifold

CLIP_VALUE = 10.0
"""Largest absolute value of a gradient, as in the released training."""


class Learning(Hook):
    """Every batch sees the network at one width, drawn from the list, with jittered coordinates.

    The program that runs is the whole one: channels beyond the width are zero, which is the same
    function as the narrower network. At width 1 the tensors are also drawn to those of the
    pretrained program, each value by its size.
    """

    def __init__(
        self,
        manifold: Manifold,
        program: Program,
        groups: Sequence[ChannelGroup],
        widths: Sequence[float],
        context: Context,
        *,
        shown: float,
        decay: float,
        norm: float,
        reconstruction: float,
    ) -> None:
        self.manifold, self.widths, self.context = manifold, widths, context
        self.shown, self.decay, self.norm, self.reconstruction = shown, decay, norm, reconstruction
        self.layouts = {
            width: layouts(program, groups, list(manifold.networks), width)
            for width in {*widths, shown}
        }
        self.pretrained = {n: program.state[n].detach().clone() for n in manifold.networks}
        self.squares = {n: max(float(t.square().mean()), 1e-12) for n, t in self.pretrained.items()}
        self.parameters = {
            f"neumeta.{number}.{part}": nn.Parameter(value.clone())
            for number, parts in enumerate(manifold.networks.values())
            for part, value in parts.items()
        }
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.best: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        self.width = 1.0

    def own(self) -> Mapping[str, nn.Parameter]:
        return self.parameters

    def on_parameters(self, at: Moment, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not torch.is_grad_enabled():  # an evaluation: as it will be used
            return {**values, **self._whole(self.average, self.shown, 0.0, None)}
        generator = self.context.generator("manifold", at.step, at.micro)
        drawn = int(torch.randint(len(self.widths), (), generator=generator))
        self.width = self.widths[drawn]
        whole = self._whole(values, self.width, self.manifold.noise, generator)
        return {**values, **whole}

    def on_loss(
        self, at: Moment, loss: Tensor, outputs: Any, batch: Mapping[str, Tensor]
    ) -> Tensor:
        for name, made in self.made.items():
            loss = loss + self.norm * made.norm()
            if self.width == 1:
                wanted = self.pretrained[name].to(made.device)
                weight = wanted.abs() / wanted.abs().max().clamp_min(1e-12)
                distance = (weight * (made - wanted).square()).mean() / self.squares[name]
                loss = loss + self.reconstruction * distance
        return loss

    def before_step(self, at: Moment) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters.values(), CLIP_VALUE)

    @torch.no_grad()
    def after_step(self, at: Moment) -> None:
        decay = min(self.decay, (1 + at.step) / (10 + at.step))
        for name, value in self.parameters.items():
            self.average[name] = self.average[name].to(value.device).lerp(value, 1 - decay)

    def keep_best(self) -> None:
        self.best = dict(self.average)

    def restore_best(self) -> None:
        self.average = dict(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.best = dict(state["average"]), dict(state["best"])

    def networks(self) -> dict[str, dict[str, Tensor]]:
        """The averaged networks, by name of the tensor that each makes."""
        return {
            name: {part: value.cpu() for part, value in self._parts(self.average, number).items()}
            for number, name in enumerate(self.manifold.networks)
        }

    def _whole(
        self,
        values: Mapping[str, Tensor],
        width: float,
        noise: float,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Tensors of the whole program, with zeros beyond the width."""
        self.made, found = {}, {}
        for number, name in enumerate(self.manifold.networks):
            layout = self.layouts[width][name]
            own = self._parts(values, number)
            made = self.manifold.make(name, layout, noise, generator, own)
            self.made[name] = made
            found[name] = _spread(made, self.pretrained[name].shape, layout.where)
        return found

    def _parts(self, values: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        prefix = f"neumeta.{number}."
        return {n.removeprefix(prefix): values[n] for n in self.parameters if n.startswith(prefix)}


def _spread(made: Tensor, shape: torch.Size, where: Mapping[int, Tensor]) -> Tensor:
    """A tensor of a shape with given values at positions, and zeros elsewhere."""
    for dim, positions in where.items():
        wide = list(made.shape)
        wide[dim] = shape[dim]
        made = made.new_zeros(wide).index_copy(dim, positions.to(made.device), made)
    return made
