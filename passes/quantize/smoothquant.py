"""quantize.smoothquant: moves outlier channels of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.calibrate import Channels, Rows, Several, observe
from graphwright.ir.edit import Editor
from graphwright.ir.program import Program
from graphwright.ir.select import WEIGHT_ARGUMENT, Layer, select
from graphwright.passes.base import Action, Context, Options, Pass, Result
from graphwright.passes.quantize import _math
from graphwright.passes.quantize._sites import INPUT_ARGUMENT

aten = torch.ops.aten

INNER_AXIS = {"linear": 1, "matmul": 0, "addmm": 0}
"""Axis of the weight that input channels are on."""

NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
"""Norms whose affine parameters can take the factors, and the places of these."""

ALPHAS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
"""Values that the search tries, besides leaving the group as it is."""

ROWS, ROWS_PER_BATCH = 256, 32
"""Rows of activations that the search compares on, and how many of them a batch gives."""


class SmoothquantOptions(Options):
    """Options of quantize.smoothquant."""

    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the difficulty that moves into the weights; searched for every group of layers by
    the int8 error of their outputs when absent."""

    targets: tuple[str, ...] = ("*",)
    """Layers whose input is smoothed: selector patterns over names and kinds."""

    insert_scales: bool = True
    """Multiply the activation in the graph where no norm or layer before it can take the factors
    (as in post-norm transformers); else such groups are left alone."""


@dataclass(frozen=True)
class Group:
    """Layers that read one activation."""

    x: fx.Node
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """Names of its layers, joined."""
        return ", ".join(layer.name for layer in self.layers)


class Smoothquant(Pass):
    """Divides input channels by factors and multiplies the weight columns that read them.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the same for all layers that read x. The factors
    go into the norm, linear layer or gated product before x when nothing else reads x, at no
    cost; otherwise one multiplication is put in front of the group. The function stays the same:
    `quantize.int8` behind it is what gains.

    Source: Xiao et al. 2023, "SmoothQuant", equation 4. The paper fixes alpha for a model; the
    search over it for every group is ours.
    """

    contract = "exact"
    needs = "calibration"
    Options = SmoothquantOptions

    def run(self, program: Program, context: Context) -> Result:
        layers = select(program, self.options.targets, INNER_AXIS)
        groups = find_groups(program, layers)
        channels = {group.x.name: Channels() for group in groups}
        rows = {group.x.name: Rows(ROWS, ROWS_PER_BATCH) for group in groups}
        watched = {name: Several(channels[name], rows[name]) for name in channels}
        assert context.calibration is not None
        observe(program, watched, context.calibration, context.progress)
        editor = Editor(program, by=self.id)
        twin = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
        actions = []
        for index, group in enumerate(groups):
            seen = channels[group.x.name]
            assert seen.low is not None
            assert seen.high is not None
            factors, alpha = self._factors(
                program, group, seen.low, seen.high, rows[group.x.name].rows()
            )
            actions.append(_apply(editor, twin, group, factors, alpha, self.options.insert_scales))
            context.progress("smoothing", index + 1, len(groups))
        done = {layer.name for group in groups for layer in group.layers}
        actions += [
            Action(layer.name, "left alone", "its weight is shared or not float32")
            for layer in layers if layer.name not in done
        ]  # fmt: skip
        return Result(editor.finish(), tuple(actions))

    def _factors(
        self, program: Program, group: Group, low: Tensor, high: Tensor, rows: Tensor
    ) -> tuple[Tensor | None, float]:
        """The factors of a group, and their alpha; None when the search finds none that helps."""
        weights = [columns(program, layer) for layer in group.layers]
        reach = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        if self.options.alpha is not None:
            return _math.smoothing(low, high, reach, self.options.alpha), self.options.alpha
        tried: list[tuple[float, Tensor | None, float]] = [
            (int8_error(weights, rows, low, high), None, 0.0)
        ]
        for alpha in ALPHAS:
            s = _math.smoothing(low, high, reach, alpha)
            error = int8_error([w * s for w in weights], rows / s, low / s, high / s)
            tried.append((error, s, alpha))
        _, factors, alpha = min(tried, key=lambda t: t[0])
        return factors, alpha


def find_groups(program: Program, layers: Sequence[Layer]) -> list[Group]:
    """Selected layers by the activation they read; each weight must be its layer's own."""
    found: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        x = layer.node.args[INPUT_ARGUMENT.get(layer.kind, 0)]
        if not layer.weight or not isinstance(x, fx.Node):
            continue
        weight = program.state[layer.weight]
        readers = program.graph.find_nodes(op="get_attr", target=layer.weight)
        if weight.dtype != torch.float32 or weight.dim() != 2:
            continue
        if sum(len(node.users) for node in readers) == 1:
            found.setdefault(x, []).append(layer)
    return [Group(x, tuple(group)) for x, group in found.items()]


def columns(program: Program, layer: Layer) -> Tensor:
    """The layer's weight as (out, in)."""
    weight = program.state[layer.weight].detach()
    return weight if INNER_AXIS[layer.kind] == 1 else weight.T


def int8_error(weights: Sequence[Tensor], rows: Tensor, low: Tensor, high: Tensor) -> float:
    """Squared error of the group's outputs with int8 weights and a uint8 activation.

    Args:
        weights: (out, in) each.
        rows: (rows, in) sampled inputs.
        low, high: (in,) extremes of the inputs over all calibration data.
    """
    scale, zero_point = _math.activation_parameters(float(low.min()), float(high.max()))
    codes = torch.clamp(torch.round(rows / scale) + zero_point, 0, 255)
    quantized = (codes - zero_point) * scale
    total = 0.0
    for w in weights:
        w_codes, w_scale = _math.quantize_weight(w, 0, overflow="half")
        other = quantized @ (w_codes.float() * w_scale[:, None]).T
        total += float((rows @ w.T - other).double().square().sum())
    return total


def _apply(
    editor: Editor,
    twin: dict[fx.Node, fx.Node],
    group: Group,
    factors: Tensor | None,
    alpha: float,
    insert: bool,
) -> Action:
    if factors is None:
        return Action(group.name, "left alone", "no factors lower the int8 error")
    x = twin[group.x]
    nodes = {twin[layer.node] for layer in group.layers}
    taken = set(x.users) == nodes and _fold(editor, x, factors)
    if not taken and not insert:
        return Action(group.name, "left alone", "nothing before it can take the factors")
    if not taken:
        name = editor.add_state(f"{group.layers[0].name}.smoothing", 1 / factors)
        scale = editor.get(name)
        first = next(n for n in editor.graph.nodes if n in nodes)
        new = editor.call(aten.mul.Tensor, x, scale, before=first, like=first)
        for node in nodes:
            node.replace_input_with(x, new)
    for layer in group.layers:
        wide = factors if INNER_AXIS[layer.kind] == 1 else factors[:, None]
        _scale(editor, twin[layer.node].args[WEIGHT_ARGUMENT.get(layer.kind, 1)], wide)
    return Action(group.name, f"{'folded' if taken else 'scaled'}, alpha {alpha:g}")


def _fold(editor: Editor, x: fx.Node, factors: Tensor) -> bool:
    """Divides what computes x by the factors; False when it cannot take them."""
    if x.target in NORMS:
        places = [p for p in NORMS[x.target] if len(x.args) > p and x.args[p] is not None]
        if places[:1] != [2] or not all(_own(editor, x.args[p]) for p in places):
            return False
        for place in places:
            _scale(editor, x.args[place], 1 / factors)
        return True
    if x.target is aten.linear.default:
        parameters = [a for a in x.args[1:] if a is not None]
        if not all(_own(editor, p) for p in parameters):
            return False
        _scale(editor, parameters[0], 1 / factors[:, None])
        for bias in parameters[1:]:
            _scale(editor, bias, 1 / factors)
        return True
    if x.target is aten.mul.Tensor:
        # A gated product is linear in either operand; the ungated one is a plain layer.
        return any(
            isinstance(a, fx.Node)
            and a.target is aten.linear.default
            and len(a.users) == 1
            and a.meta["val"].shape == x.meta["val"].shape
            and _fold(editor, a, factors)
            for a in x.args
        )
    return False


def _own(editor: Editor, node: object) -> bool:
    """Whether a parameter is stored, and read at this one place."""
    tensor = editor.tensor(node)
    return tensor is not None and isinstance(node, fx.Node) and len(node.users) == 1


def _scale(editor: Editor, node: object, factors: Tensor) -> None:
    assert isinstance(node, fx.Node)
    old = editor.state[str(node.target)]
    value = old.detach() * factors
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    editor.set_state(str(node.target), value)
