"""quantize.awq: weights of few bits, scaled before so that those that matter round finer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes
from graphwright.ir.layers.kinds import (
    EXPERTS,
    MATRICES,
    PRODUCTS,
    STORED,
)
from graphwright.ir.layers.products import as_matrix, weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.layers.selectors import layers as find_layers
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import block_for, round_to_nearest
from graphwright.ir.stored.insert import Make, rebuild_blocks
from graphwright.ir.work import ROUNDED, Load, Work
from graphwright.passes.base import WEIGHTS, Action, Context, Pass, Result
from graphwright.passes.quantize._activations.folding import Group, divide, find_groups
from graphwright.passes.quantize._activations.region import feeds_scores, region_of
from graphwright.passes.quantize._activations.scaling import Scaling
from graphwright.passes.quantize._low_bit.coding import choose, insert, uncalibrated
from graphwright.passes.quantize._low_bit.rounding import (
    BlockOptions,
    blocks_of,
    round_layers,
    solved,
)
from graphwright.passes.quantize._math import awq as awq_math

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class AwqOptions(BlockOptions):
    """Options of quantize.awq."""

    clip: bool = True
    """Also look for a limit of every block's weights; not for layers that make attention scores."""

    insert_scales: bool = True
    """Multiply the activation in the graph where nothing before it can take the factors (behind a
    GELU, in post-norm transformers); else such groups are not scaled."""

    tokens: Annotated[int, Field(ge=1)] = 2048
    """Rows of calibration data that factors are compared on: whole batches, spread evenly, as long
    as they are not more. Means and limits are of all."""


@dataclass(frozen=True)
class Choice:
    """The result of the search for a group.

    Attributes:
        alpha: exponent; 0 for none.
        factors: (in,), of stacks (experts, in); or None.
        gain: loss with them as a share of the loss without.
        rows: of calibration data that reached the group.
    """

    alpha: float
    factors: Tensor | None
    gain: float
    rows: int = 1


class Awq(Pass[AwqOptions]):
    """Scales input channels by how large their activations are, then rounds to 2 to 8 bits.

    A weight column whose input is large matters more. For all layers that read an activation the
    columns are multiplied by s_j = mean|x_j|^alpha and the activation is divided by it, which
    changes nothing in float and makes large columns round finer. alpha is searched from 0 to 0.95
    by the error behind the layers: of the attention for q, k and v, of the MLP for its gate and
    value, of the layer itself elsewhere, of its own product for each expert of a stack, which has
    factors of its own; 0 is rounding to nearest, so that the loss is never more.
    The factors go into the norm or layer in front where these can take them. Then weights are
    clamped where this lowers the error of their block's part of the output. Weights become codes
    with a scale and a zero point for every block of inputs (`graphwright::dequantize_blocks`).

    All is measured on the activations of the float program, so that no group waits for another:
    as many are searched at a time as there are jobs. Embedding tables, convolutions, layers that
    share their weight, and layers that no calibration data reaches are rounded to nearest.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", sections 3.2 and 4, and its code. Ranges are extended to hold zero here.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = WEIGHTS
    codes = WEIGHTS
    stores_weights = True
    needs = "calibration"
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        # every exponent is tried on so many rows, and a limit of every block likewise
        layers = [layer for layer in load.targeted(self.options.targets) if layer.rows]
        macs = sum(float(self.options.tokens) * layer.inner * layer.outer for layer in layers)
        size = sum(layer.bytes for layer in layers)
        tries = awq_math.STEPS * (2 if self.options.clip else 1)
        tried = Work(macs=macs, moved=ROUNDED * size, calls=float(len(layers))).times(tries)
        return super().cost(load) + tried

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        layers, actions = choose(program, self.id, options.targets, embeddings=options.embeddings)
        groups = find_groups(program, layers, FLOATS)
        choices = self._choices(program, groups, context)
        scaled, how = apply_factors(program, self.id, groups, choices, options.insert_scales)
        scaling = {
            layer.node.name: (choice, kind)
            for group, choice, kind in zip(groups, choices, how, strict=True)
            for layer in group.layers
        }
        names = {(layer.node.name, layer.place) for layer in layers}
        layers = [x for x in find_layers(scaled, {*PRODUCTS, *STORED})
                  if (x.node.name, x.place) in names]  # fmt: skip
        clipped = self._clipped(scaled, [x for x in layers if x.node.name in scaling], context)
        plain = [x for x in layers if x.node.name not in clipped]
        rounded = round_layers(scaled, plain, options, context.jobs)

        def find(layer: Layer) -> tuple[Make, Action]:
            found = clipped.get(layer.node.name)
            blocks = blocks_of(found) if found else rounded[weight_node(layer)][0]
            what, reason = _described(layer, scaling.get(layer.node.name))
            what = f"int{blocks.bits}, block {blocks.block}" + what
            if found:
                what += f", clipping takes {found.info['gain']:.0%} off"
            return rebuild_blocks(blocks), Action(layer.name, what, reason)

        editor = Editor(scaled, by=self.id)
        actions += insert(editor, layers, find)
        moved = scaled if any(how) else None
        return Result(editor.finish(), tuple(actions), _metrics(choices), uncompressed=moved)

    def _choices(self, program: Program, groups: Sequence[Group], context: Context) -> list[Choice]:
        """Factors of every group, in its order."""
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        constant = constant_nodes(program.graph)
        stacks = {group.layers[0].node: group for group in groups if group.routing}
        regions = {
            group.layers[0].node: (
                group, region_of([each.node for each in group.layers], order, constant)
            )
            for group in groups if not group.routing
        }  # fmt: skip
        # The first layer of a group stands for it.
        found = sweep(
            program, [group.layers[0] for group in groups], context.batches,
            Scaling(
                program, regions, stacks, self.options, self.options.tokens, context.device
            ), context,
            follow="program",
        )  # fmt: skip
        chosen = [found[group.layers[0].node.name] for group in groups]
        return [
            Choice(
                x.info["alpha"],
                x.state["factors"] if x.info["alpha"] else None,
                x.info["gain"],
                int(x.info["rows"] * max(len(x.parts), 1)),
            )
            for x in chosen
        ]

    def _clipped(
        self, scaled: Program, layers: Sequence[Layer], context: Context
    ) -> dict[str, Solved]:
        """Codes of the layers that have limits, by name of the node."""
        if not self.options.clip:
            return {}
        bounded = [layer for layer in layers if not feeds_scores(layer.node)]
        method = Clipping(self.options)
        return sweep(scaled, bounded, context.batches, method, context, follow="program")


@dataclass(frozen=True)
class Clipping:
    """The search for limits, and rounding, of one layer after the other."""

    options: AwqOptions

    def gather(self, site: Site) -> Tensor:
        """Second moments within the blocks of the layers' input."""
        return awq_math.moments(site.rows(), block_for(site.geometry.depth, self.options.block))

    def solve(self, task: Task) -> Solved:
        """The codes of the clamped weight, and what share of the error clamping takes off."""
        o, block = self.options, block_for(task.geometry.depth, self.options.block)
        w = as_matrix(task.geometry, task.weight)[0].float()
        limit, gain = awq_math.limits(w, task.stats, o.bits, symmetric=o.symmetric)
        clamped = awq_math.clamp(w, limit, block).to("cpu", task.weight.dtype)
        blocks = round_to_nearest(clamped, o.bits, block, symmetric=o.symmetric)
        return solved(blocks, gain=float(gain))


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


def _described(layer: Layer, scaling: tuple[Choice, str] | None) -> tuple[str, str]:
    """The report on a layer's scaling, and the reason where it is not as asked for."""
    if scaling is None:
        return "", "rounded to nearest: " + _why_plain(layer)
    choice, how = scaling
    what = f", {how}, alpha {choice.alpha:g}" if how else ", not scaled"
    if choice.factors is None:
        return what, "" if choice.rows else "no calibration data reaches it"
    what += f", loss {choice.gain:.2f} of plain rounding"
    return what, "" if how else "nothing before it can take the factors"


def _why_plain(layer: Layer) -> str:
    if layer.kind in STORED:
        return uncalibrated(layer)
    if layer.kind not in (*MATRICES, *EXPERTS):
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
