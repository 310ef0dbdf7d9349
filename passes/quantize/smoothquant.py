"""quantize.smoothquant: moves outlier channels of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.calibration.observe import Channels, Rows, Several, observe
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import EXPERTS, MATRICES
from graphwright.ir.layers.selectors import select
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Options, Pass, Result
from graphwright.passes.quantize._activations.folding import (
    Group,
    columns,
    divide,
    find_groups,
)
from graphwright.passes.quantize._math import int8 as int8_math

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

    experts: bool = False
    """Smooth the input of stacks of experts too, by factors that all experts share. No backend
    multiplies their rows on integers: `quantize.int8` rounds their weights alone, and factors move
    the difficulty into just these. It is for what rounds the rows as well."""


class Smoothquant(Pass[SmoothquantOptions]):
    """Divides input channels by factors and multiplies the weight columns that read them.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the same for all layers that read x. The factors
    go into the norm, linear layer or gated product before x when nothing else reads x, at no
    cost; otherwise one multiplication is put in front of the group. The function stays the same:
    `quantize.int8` behind it is what gains.

    Source: Xiao et al. 2023, "SmoothQuant", equation 4. The paper fixes alpha for a model; the
    search over it for every group is ours.
    """

    contract = "exact"
    stored_bits = 16
    stores_weights = True
    weights = "reformed"
    needs = "calibration"

    def run(self, program: Program, context: Context) -> Result:
        chosen = select(program, self.options.targets, (*MATRICES, *EXPERTS))
        layers = [x for x in chosen if self.options.experts or x.kind in MATRICES]
        groups = find_groups(program, layers)
        channels = {group.x.name: Channels() for group in groups}
        rows = {group.x.name: Rows(ROWS, ROWS_PER_BATCH) for group in groups}
        watched = {name: Several(channels[name], rows[name]) for name in channels}
        observe(program, watched, context.batches, context.progress, padding=False)
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
            Action.left(layer.name, "its weight is shared or not float32")
            for layer in layers if layer.name not in done
        ]  # fmt: skip
        actions += [
            Action.left(layer.name, "experts: false; their rows stay in float")
            for layer in chosen if layer not in layers
        ]  # fmt: skip
        return Result(editor.finish(), tuple(actions))

    def _factors(
        self, program: Program, group: Group, low: Tensor, high: Tensor, rows: Tensor
    ) -> tuple[Tensor | None, float]:
        """The factors of a group, and their alpha; None when the search finds none that helps."""
        weights = [columns(program, layer) for layer in group.layers]
        reach = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        if self.options.alpha is not None:
            return int8_math.smoothing(low, high, reach, self.options.alpha), self.options.alpha
        tried: list[tuple[float, Tensor | None, float]] = [
            (int8_error(weights, rows, low, high), None, 0.0)
        ]
        for alpha in ALPHAS:
            s = int8_math.smoothing(low, high, reach, alpha)
            error = int8_error([w * s for w in weights], rows / s, low / s, high / s)
            tried.append((error, s, alpha))
        _, factors, alpha = min(tried, key=lambda t: t[0])
        return factors, alpha


def int8_error(weights: Sequence[Tensor], rows: Tensor, low: Tensor, high: Tensor) -> float:
    """Squared error of the group's outputs with int8 weights and a uint8 activation.

    Args:
        weights: (out, in) each.
        rows: (rows, in) sampled inputs.
        low, high: (in,) extremes of the inputs over all calibration data.
    """
    scale, zero_point = int8_math.activation_parameters(float(low.min()), float(high.max()))
    codes = torch.clamp(torch.round(rows / scale) + zero_point, 0, 255)
    quantized = (codes - zero_point) * scale
    total = 0.0
    for w in weights:
        w_codes, w_scale = int8_math.quantize_weight(w, 0, hold_pairs=True)
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
        return Action.left(group.name, "no factors lower the int8 error")
    if group.routing is not None:
        count = group.layers[0].node.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
        factors = factors.expand(int(count), -1)
    how = divide(editor, twin, group, factors, insert=insert, name="smoothing")
    if not how:
        return Action.left(group.name, "nothing before it can take the factors")
    return Action(group.name, f"{how}, alpha {alpha:g}")
