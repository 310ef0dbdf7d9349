"""Levels that are shares of zeros: every layer pruned to each, a level being so many weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.passes.search._evolution.levels import Levels, Unit

SHARE_OF_SMALLEST = 16
"""Steps that the smallest layer has, where the size of a step is not given."""


class Sparsity:
    """The database of sparsities.

    A unit at level l keeps so many weights as its share of the target, and l steps more; all steps
    are equally many weights, so that layers of any two sizes can give each other one.

    Args:
        program: dense.
        prune: gives the program with some layers (by names) at a sparsity.
        target: share of zeros in all selected weights together.
        steps: levels on either side of the target.
        step: weights of a step; a sixteenth of the smallest layer when None.
        targets: selector of the layers.
        by: id of the pass.

    Raises:
        ModelError: no layer has stored weights.
    """

    def __init__(
        self, program: Program, prune: Callable[[float, Sequence[str]], Program], target: float,
        steps: int, step: int | None, targets: Sequence[str], by: str,
    ) -> None:  # fmt: skip
        groups: dict[str, list[Layer]] = {}
        for layer in select(program, targets, PRODUCTS):
            if layer.weight:
                groups.setdefault(layer.weight, []).append(layer)
        if not groups:
            raise ModelError("none of the targets has a weight that can be pruned")
        self.trial, self.by, self._prune = program, by, prune
        self._weights = list(groups)
        self.sizes = [program.state[name].numel() for name in groups]
        step = step or max(1, min(self.sizes) // SHARE_OF_SMALLEST)
        self.units: list[Unit] = []
        self.sparsities: list[list[float]] = []
        self.start: list[int] = []
        for (name, group), size in zip(groups.items(), self.sizes, strict=True):
            kept = round(size * (1 - target))
            places = [kept + i * step for i in range(-steps, steps + 1)]
            places = [place for place in places if 0 <= place <= size]
            self.start.append(places.index(kept))
            self.sparsities.append([1 - place / size for place in places])
            layers = tuple(layer.name for layer in group)
            nodes = tuple(layer.node.name for layer in group)
            self.units.append(Unit(group[0].name or name, layers, nodes, "", tuple(places)))
        self._made: dict[float, dict[str, Tensor]] = {}

    def build(self, progress: Callable[[str, int, int], None]) -> None:
        """Prunes every layer to every level: layers that share a sparsity in one run."""
        wanted: dict[float, list[int]] = {}
        for unit, sparsities in enumerate(self.sparsities):
            for sparsity in sparsities:
                wanted.setdefault(sparsity, []).append(unit)
        for done, (sparsity, units) in enumerate(sorted(wanted.items())):
            progress(f"sparsity {sparsity:.3f}", done, len(wanted))
            pruned = self._prune(sparsity, [n for u in units for n in self.units[u].layers])
            names = [self._weights[unit] for unit in units]
            self._made[sparsity] = {name: pruned.state[name].detach() for name in names}

    def tensors(self, unit: int, level: int) -> Mapping[str, Tensor]:
        """The unit's weight at a level."""
        name = self._weights[unit]
        return {name: self._made[self.sparsities[unit][level]][name]}

    def made(self, levels: Levels) -> Program:
        """The program with all weights at their levels."""
        editor = Editor(self.trial, by=self.by)
        for unit, level in enumerate(levels):
            for name, value in self.tensors(unit, level).items():
                old = editor.state[name]
                is_parameter = isinstance(old, torch.nn.Parameter)
                editor.set_state(
                    name, torch.nn.Parameter(value, old.requires_grad) if is_parameter else value
                )
        return editor.finish()
