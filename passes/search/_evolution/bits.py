"""Levels that are widths of weights: every layer quantized to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS, put_at
from graphwright.ir.layers.products import weight_key, weight_node, weight_value
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.ir.stored.transplant import mixed
from graphwright.passes.search._evolution.levels import Levels, Unit


class Bits:
    """The database of widths.

    A layer's weight at a width is what the quantizer left there, as floats; tensors of a trial are
    these, so that trials of all mixtures share one graph.

    Args:
        program: in floats.
        quantize: gives the program with all selected layers at a width.
        widths: ascending.
        targets: selector of the layers.
        by_size: whether only layers with equally many weights give each other bits.
        by: id of the pass.

    Raises:
        ModelError: the quantizer quantized nothing.
    """

    def __init__(
        self, program: Program, quantize: Callable[[int], Program], widths: Sequence[int],
        targets: Sequence[str], *, by_size: bool, by: str,
    ) -> None:  # fmt: skip
        self.by, self.widths = by, list(widths)
        self.programs = [quantize(bits) for bits in self.widths]
        stored = [{layer.node.name: layer for layer in select(p, ["*"], PRODUCTS)}
                  for p in self.programs]  # fmt: skip
        groups: dict[str, list[Layer]] = {}
        for layer in select(program, targets, PRODUCTS):
            twin = stored[0].get(layer.node.name)
            if twin is not None and twin.weight != layer.weight:
                groups.setdefault(weight_key(layer), []).append(layer)
        if not groups:
            raise ModelError("the quantizer has quantized none of the targets")
        self.units = [self._unit(group, by_size) for group in groups.values()]
        self.trial, names = _with_own_weights(program, groups.values(), by)
        self._names = names
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._twins = [[by_node[group[0].node.name] for by_node in stored]
                       for group in groups.values()]  # fmt: skip

    def _unit(self, group: Sequence[Layer], by_size: bool) -> Unit:
        count = int(weight_node(group[0]).meta["val"].numel())
        return Unit(
            group[0].name, tuple(layer.name for layer in group),
            tuple(layer.node.name for layer in group), str(count) if by_size else "",
            tuple(count * bits for bits in self.widths),
        )  # fmt: skip

    def tensors(self, unit: int, level: int) -> Mapping[str, Tensor]:
        """The unit's weight at a width, as floats."""
        if (unit, level) not in self._weights:
            value = weight_value(self.programs[level], self._twins[unit][level])
            self._weights[unit, level] = value.to(self.trial.state[self._names[unit]].dtype)
        return {self._names[unit]: self._weights[unit, level]}

    def made(self, levels: Levels) -> Program:
        """The mixture, in codes."""
        most = max(range(len(self.widths)), key=levels.count)
        parts = [
            (unit.nodes, self.programs[level])
            for unit, level in zip(self.units, levels, strict=True)
            if level != most
        ]
        return mixed(self.programs[most], parts, self.by)


def _with_own_weights(
    program: Program, groups: Iterable[Sequence[Layer]], by: str
) -> tuple[Program, list[str]]:
    """The program whose units read weights that nothing else reads (a tied embedding, say)."""
    editor = Editor(program, by=by)
    nodes = {node.name: node for node in editor.graph.nodes}
    names = []
    for number, group in enumerate(groups):
        weight = weight_value(program, group[0])
        name = editor.add_state(f"unit_{number}_weight", nn.Parameter(weight, requires_grad=False))
        for layer in group:
            node = nodes[layer.node.name]
            args = list(node.args)
            put_at(args, layer.place, editor.get(name))
            editor.set_args(node, *args, **dict(node.kwargs))
        names.append(name)
    return editor.finish(propagate=False), names
