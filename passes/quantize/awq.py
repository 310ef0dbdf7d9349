"""quantize.awq: weights of few bits, scaled before so that those that matter round finer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.calibrate import bound_batches, observe
from graphwright.ir.context import Batch
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layerwise import MASK_INPUTS
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.ir.select import Layer, select
from graphwright.ir.select import layers as find_layers
from graphwright.ir.weights import PRODUCTS, weight_node, weight_value
from graphwright.passes.base import Action, Context, Options, Pass, Result
from graphwright.passes.quantize import _awq
from graphwright.passes.quantize._blocks import block_for, round_to_nearest
from graphwright.passes.quantize._folding import INNER_AXIS, Group, columns, divide, find_groups
from graphwright.passes.quantize._insert import matrix_of, rebuild_blocks, replace_weight
from graphwright.passes.quantize._refusals import NO_MATRIX, refusals
from graphwright.passes.quantize._region import (
    Region,
    Values,
    constant_nodes,
    feeds_scores,
    region_of,
    walk,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class AwqOptions(Options):
    """Options of quantize.awq."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a code."""

    block: Annotated[int, Field(ge=-1)] = 128
    """Weights of a row that share a scale; 0 or -1 for one scale per row. 128 is the paper's; 32 is
    more exact, and what ONNX Runtime's CPU kernels are fastest with. Rows shorter than this get a
    smaller one."""

    symmetric: bool = False
    """Grids around zero, without stored zero points."""

    clip: bool = True
    """Also look for a limit of every block's weights; not for layers that make attention scores."""

    insert_scales: bool = True
    """Multiply the activation in the graph where nothing before it can take the factors (behind a
    GELU, in post-norm transformers); else such groups are not scaled."""

    tokens: Annotated[int, Field(ge=1)] = 2048
    """Rows of calibration data that factors are compared on: whole batches, spread evenly, as long
    as they are not more. Means and limits are of all."""

    targets: Selector = ("*",)
    """Layers to quantize: selector patterns over names and kinds."""

    embeddings: bool = True
    """Round embedding tables to nearest, on the same grid."""

    max_error: Annotated[float, Field(gt=0)] | None = None
    """Largest relative error of the outputs, ||a-b|| / ||a||; no bound when absent."""


@dataclass(frozen=True)
class Choice:
    """What the search found for a group.

    Attributes:
        alpha: exponent; 0 for none.
        factors: (in,), or None.
        gain: loss with them as a share of the loss without.
    """

    alpha: float
    factors: Tensor | None
    gain: float


class Awq(Pass):
    """Scales input channels by how large their activations are, then rounds to 2 to 8 bits.

    A weight column whose input is large matters more. For all layers that read an activation the
    columns are multiplied by s_j = mean|x_j|^alpha and the activation is divided by it, which
    changes nothing in float and makes large columns round finer. alpha is searched from 0 to 0.95
    by the error behind the layers: of the attention for q, k and v, of the MLP for its gate and
    value, of the layer itself elsewhere; 0 is rounding to nearest, so that the loss is never more.
    The factors go into the norm or layer in front where these can take them. Then weights are
    clamped where this lowers the error of their block's part of the output. Weights become codes
    with a scale and a zero point for every block of inputs (`graphwright::dequantize_blocks`).

    Embedding tables, convolutions and layers that share their weight are rounded to nearest.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", sections 3.2 and 4, and its code. Ranges are extended to hold zero here.
    """

    contract = "lossy"
    needs = "calibration"
    Options = AwqOptions
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def run(self, program: Program, context: Context) -> Result:
        options: AwqOptions = self.options
        chosen = select(program, options.targets, {*PRODUCTS, *NO_MATRIX, "embedding"})
        refused = refusals(program, chosen, embeddings=options.embeddings)
        layers = [layer for layer in chosen if layer.node not in refused]
        if not layers:
            reasons = sorted({f"{layer.name}: {refused[layer.node]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        groups = find_groups(program, layers, FLOATS)
        assert context.calibration is not None
        seen = self._look(program, groups, context)
        choices = self._search(program, groups, seen, context)
        scaled, how = apply_factors(program, self.id, groups, choices, options.insert_scales)
        described = {
            layer.node.name: (group, choice, kind)
            for group, choice, kind in zip(groups, choices, how, strict=True)
            for layer in group.layers
        }
        editor = Editor(scaled, by=self.id)
        actions = [Action(each.name, "left alone", refused[each.node])
                   for each in chosen if each.node in refused]  # fmt: skip
        names = {layer.node.name for layer in layers}
        done: dict[fx.Node, str] = {}
        for layer in find_layers(scaled, {*PRODUCTS, "embedding"}):
            if layer.node.name not in names:
                continue
            weight = weight_node(layer)
            if weight in done:
                what = f"int{options.bits}"
                actions.append(Action(layer.name, what, f"shares the weight of {done[weight]}"))
                continue
            done[weight] = layer.name
            found = described.get(layer.node.name)
            inputs = seen[found[0].x.name] if found else None
            actions.append(self._round(editor, scaled, layer, found, inputs))
            context.progress(layer.name, len(done), len(names))
        return Result(editor.finish(), tuple(actions), _metrics(choices))

    def _look(
        self, program: Program, groups: Sequence[Group], context: Context
    ) -> dict[str, _awq.Inputs]:
        """Statistics of every group's input, over all calibration data."""
        assert context.calibration is not None
        padding = paddings(program, context.calibration)
        found = {
            group.x.name: _awq.Inputs(
                block_for(columns(program, group.layers[0]).shape[1], self.options.block), padding
            )
            for group in groups
        }
        if found:
            observe(program, found, context.calibration, context.progress)
        return found

    def _search(
        self,
        program: Program,
        groups: Sequence[Group],
        seen: dict[str, _awq.Inputs],
        context: Context,
    ) -> list[Choice]:
        """Factors of every group, in its order."""
        options: AwqOptions = self.options
        assert context.calibration is not None
        batches = list(bound_batches(program, context.calibration))
        padding = paddings(program, context.calibration)
        kept = spread_batches([_tokens(b, p) for b, p in zip(batches, padding, strict=True)],
                              options.tokens)  # fmt: skip
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        constant = constant_nodes(program.graph)
        regions = [region_of([each.node for each in g.layers], order, constant) for g in groups]
        choices: dict[int, Choice] = {}

        def visit(
            index: int, reads: list[Values], ends: list[list[Tensor]], constants: Values
        ) -> None:
            trial = _Trial(regions[index], reads, ends, constants, [padding[b] for b in kept])
            group = groups[index]
            mean = seen[group.x.name].mean
            choices[index] = best_factors(program, group, mean, trial, options)
            context.progress("scaling", len(choices), len(groups))

        with torch.no_grad():
            walk(program, [batches[b] for b in kept], regions, visit)
        return [choices[index] for index in range(len(groups))]

    def _round(
        self,
        editor: Editor,
        program: Program,
        layer: Layer,
        found: tuple[Group, Choice, str] | None,
        inputs: _awq.Inputs | None,
    ) -> Action:
        """Clamps and rounds one weight of the scaled program."""
        options: AwqOptions = self.options
        weight = weight_value(program, layer)
        matrix = matrix_of(layer.kind, weight)
        block = block_for(matrix.shape[1], options.block)
        what, reason = f"int{options.bits}, block {block}", ""
        if found is None or inputs is None:
            reason = "rounded to nearest: " + _why_plain(layer)
        else:
            _, choice, how = found
            what += f", {how}, alpha {choice.alpha:g}" if how else ", not scaled"
            if choice.factors is not None:
                what += f", loss {choice.gain:.2f} of plain rounding"
            if choice.factors is not None and not how:
                reason = "nothing before it can take the factors"
            if options.clip and not feeds_scores(layer.node):
                by = choice.factors if how else None
                limit, gain = _awq.limits(
                    matrix.float(), inputs.moments(by), options.bits, symmetric=options.symmetric
                )
                matrix = _awq.clamp(matrix.float(), limit, block).to(matrix.dtype)
                what += f", clipping takes {float(gain):.0%} off"
        blocks = round_to_nearest(matrix, options.bits, block, symmetric=options.symmetric)
        replace_weight(editor, layer, rebuild_blocks(blocks))
        return Action(layer.name, what, reason)


@dataclass(frozen=True)
class _Trial:
    """A region with what it reads, to be run with other weights."""

    region: Region
    reads: list[Values]
    ends: list[list[Tensor]]
    constants: Values
    padding: list[Tensor | None]

    def loss(self, weights: dict[fx.Node, Tensor]) -> float:
        """Squared error of the region's ends, padding left out."""
        total = 0.0
        for reads, ends, real in zip(self.reads, self.ends, self.padding, strict=True):
            for old, new in zip(ends, self.region.run(reads, self.constants, weights), strict=True):
                change = _awq.real_rows(new - old, real)
                total += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
        return total


def best_factors(
    program: Program, group: Group, mean: Tensor, trial: _Trial, options: AwqOptions
) -> Choice:
    """The factors of least loss, among those of all exponents."""
    matrices = [columns(program, layer).float() for layer in group.layers]
    block = block_for(matrices[0].shape[1], options.block)
    plain, best, chosen = 0.0, float("inf"), 0
    for step in range(_awq.STEPS):
        s = _awq.factors(mean, step / _awq.STEPS)
        weights = {}
        for layer, w in zip(group.layers, matrices, strict=True):
            value = _awq.nearest(w * s, options.bits, block, symmetric=options.symmetric) / s
            stored = program.state[layer.weight]
            turned = value if INNER_AXIS[layer.kind] == 1 else value.T
            weights[weight_node(layer)] = turned.to(stored.dtype)
        loss = trial.loss(weights)
        if step == 0:
            plain = loss
        if loss < best:
            best, chosen = loss, step
    if chosen == 0:
        return Choice(0.0, None, 1.0)
    alpha = chosen / _awq.STEPS
    return Choice(alpha, _awq.factors(mean, alpha), best / plain)


def apply_factors(
    program: Program, by: str, groups: Sequence[Group], choices: Sequence[Choice], insert: bool
) -> tuple[Program, list[str]]:
    """The program with all factors in place, which computes what it did, and how each went in:
    `folded`, `scaled` (a multiplication was inserted), or nothing."""
    editor = Editor(program, by=by)
    twin = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
    how = [
        "" if choice.factors is None
        else divide(editor, twin, group, choice.factors, insert=insert, name="awq")
        for group, choice in zip(groups, choices, strict=True)
    ]  # fmt: skip
    return editor.finish(), how


def paddings(program: Program, batches: Iterable[Batch]) -> list[Tensor | None]:
    """What is no padding in every batch: (batch, length) booleans, None where nothing tells."""
    names = [spec.name for spec in program.signature.inputs]
    place = next((names.index(name) for name in MASK_INPUTS if name in names), None)
    if place is None or len(program.signature.inputs[place].shape) != 2:
        return [None for _ in bound_batches(program, batches)]
    return [batch[place] != 0 for batch in bound_batches(program, batches)]


def _tokens(batch: tuple[Tensor, ...], real: Tensor | None) -> int:
    if real is not None:
        return int(real.sum())
    first = batch[0]
    return first.shape[0] if first.is_floating_point() or first.dim() < 2 else first[0:].numel()


def spread_batches(sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of batches, spread evenly, with not more than `limit` rows in all; at least one."""
    for count in range(len(sizes), 1, -1):
        kept = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        if sum(sizes[k] for k in kept) <= limit:
            return kept
    return [len(sizes) // 2]


def _why_plain(layer: Layer) -> str:
    if layer.kind == "embedding":
        return "an embedding table"
    if layer.kind not in INNER_AXIS:
        return f"no factors for {layer.kind}"
    return "its weight is shared, or computed in the graph"


def _metrics(choices: Sequence[Choice]) -> dict[str, Any]:
    if not choices:
        return {}
    return {
        "groups": float(len(choices)),
        "scaled": float(sum(choice.factors is not None for choice in choices)),
        "loss_to_plain_rounding": sum(choice.gain for choice in choices) / len(choices),
    }
