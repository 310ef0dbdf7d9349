"""The distance of samples by what a denoiser computes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.ir.sampling.training import Levels, Training
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import wide


class Features:
    """Sum over layers of the mean squared difference of what they give, by unit channels.

    Every vector of channels is divided by its norm first.

    Source: P74 (Saito et al. 2025), section 3.2: the teacher's own network in the place of a
    perceptual one.
    """

    def __init__(self, training: Training, targets: Sequence[str]) -> None:
        """
        Args:
            training: of the denoiser whose layers are read.
            targets: selector patterns of layers; those with a matrix or a kernel are read.

        Raises:
            ModelError: none of them sees the sample.
        """
        program = training.program.eval()
        seen = _behind(program, training.record.sample)
        chosen = [
            layer for layer in select(program, targets)
            if layer.node in seen and _multiplies(program, layer)
        ]  # fmt: skip
        if not chosen:
            raise ModelError(f"{training.by}: no layer of features {list(targets)} sees the sample")
        self.axes = [-1 if layer.kind == "linear" else 1 for layer in chosen]
        self.read = reading(program, [layer.node.name for layer in chosen])
        self.names = [spec.name for spec in program.signature.inputs]
        self.training = training

    def __call__(self, first: Tensor, second: Tensor, at: Levels, given: Values) -> Tensor:
        """[batch] distances of samples [batch, ...] at levels; gradients go to the first."""
        found = self._values(first, at, given)
        with torch.no_grad():
            wanted = self._values(second, at, given)
        gaps = [
            (own - other).square().flatten(1).mean(1)
            for own, other in zip(found, wanted, strict=True)
        ]
        return torch.stack(gaps).sum(0)

    def _values(self, x: Tensor, at: Levels, given: Values) -> list[Tensor]:
        inputs = self.training.inputs(x, at, given)
        found = self.read(*(inputs[name] for name in self.names))
        return [F.normalize(wide(value), dim=axis, eps=1e-10)
                for value, axis in zip(found, self.axes, strict=False)]  # fmt: skip


def _multiplies(program: Program, layer: Layer) -> bool:
    """Whether a layer has a matrix or a kernel, as norms have not."""
    return not layer.weight or program.state[layer.weight].dim() > 1


def _behind(program: Program, name: str) -> set[fx.Node]:
    """Nodes that the values of an input reach."""
    stack = [n for n in program.graph.find_nodes(op="placeholder") if str(n.target) == name]
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in found and "sym_size" not in str(user.target):
                found.add(user)
                stack.append(user)
    return found
