"""quantize.awq: weights of few bits, scaled before so that those that matter round finer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.graph.constants import constant_nodes, constant_value
from graphwright.ir.layers.kinds import INPUT_AXIS, MATRICES, PRODUCTS, STORED
from graphwright.ir.layers.products import as_matrix, weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.layers.selectors import layers as find_layers
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import block_for, round_to_nearest
from graphwright.ir.stored.insert import Make, rebuild_blocks
from graphwright.passes.base import WEIGHTS, Action, Context, Pass, Result
from graphwright.passes.quantize._activations.folding import Group, divide, find_groups
from graphwright.passes.quantize._activations.region import Region, feeds_scores, region_of
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
        factors: (in,), or None.
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
    value, of the layer itself elsewhere; 0 is rounding to nearest, so that the loss is never more.
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
    takes = WEIGHTS
    codes = WEIGHTS
    stores_weights = True
    needs = "calibration"
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

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
            what = f"int{options.bits}, block {blocks.block}" + what
            if found:
                what += f", clipping takes {found.info['gain']:.0%} off"
            return rebuild_blocks(blocks), Action(layer.name, what, reason)

        editor = Editor(scaled, by=self.id)
        actions += insert(editor, layers, find, f"int{options.bits}")
        moved = scaled if any(how) else None
        return Result(editor.finish(), tuple(actions), _metrics(choices), uncompressed=moved)

    def _choices(self, program: Program, groups: Sequence[Group], context: Context) -> list[Choice]:
        """Factors of every group, in its order."""
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        constant = constant_nodes(program.graph)
        regions = {
            group.layers[0].node: (
                group, region_of([each.node for each in group.layers], order, constant)
            )
            for group in groups
        }  # fmt: skip
        # The first layer of a group stands for it.
        found = sweep(
            program, [group.layers[0] for group in groups], context.batches,
            Scaling(program, regions, self.options, context.device), context, follow="program",
        )  # fmt: skip
        chosen = [found[group.layers[0].node.name] for group in groups]
        return [
            Choice(x.info["alpha"], x.state.get("factors"), x.info["gain"], int(x.info["rows"]))
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
class Trial:
    """The data for the search of a group's factors; plain, so that it travels to a worker.

    Attributes:
        ends: computes what is compared from what the region reads and the weights.
        weights: of all layers, as stored.
        inner: axis of the input channels of each.
        mean: of |x|, (in,), over all rows.
        rows: of calibration data.
        reads: what the region reads in the batches that factors are compared on.
        real: true where a token is real and no padding, (batch, length) booleans of every batch.
    """

    ends: fx.GraphModule
    weights: tuple[Tensor, ...]
    inner: tuple[int, ...]
    mean: Tensor
    rows: int
    reads: list[list[Any]]
    real: list[Tensor | None]

    def run(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Ends of every batch, without padding."""
        for reads, real in zip(self.reads, self.real, strict=True):
            yield [awq_math.real_rows(end, real) for end in self.ends(*reads, *weights)]


@dataclass(frozen=True)
class Scaling:
    """The search for factors, one group after the other, see `ir.calibration.walk`."""

    program: Program
    regions: Mapping[fx.Node, tuple[Group, Region]]
    options: AwqOptions
    device: torch.device

    def gather(self, site: Site) -> Trial:
        """The part of the program behind the activation, and values to try it on."""
        group, region = self.regions[site.layers[0].node]
        mean, rows = awq_math.mean_size(site.rows())
        kept = spread_batches(rows, self.options.tokens)
        values = [list(site.values(node)) for node in region.reads]
        nodes = [weight_node(layer) for layer in group.layers]
        return Trial(
            region.module(self.program, nodes, self.device),
            tuple(constant_value(self.program, node).to(self.device) for node in nodes),
            tuple(INPUT_AXIS[layer.kind] for layer in group.layers),
            mean,
            sum(rows),
            [[batches[index] for batches in values] for index in kept],
            [site.real[index] for index in kept],
        )

    @property
    def solve(self) -> Callable[[Task], Solved]:
        """`best_factors` with the options; holds no program, so that it travels to a worker."""
        return partial(best_factors, self.options)


@torch.no_grad()
def best_factors(options: AwqOptions, task: Task) -> Solved:
    """The factors of least loss for the group of a `Trial`, among those of all exponents."""
    trial: Trial = task.stats
    info = {"alpha": 0.0, "gain": 1.0, "rows": float(trial.rows)}
    if not trial.rows:
        return Solved(info=info)
    block = block_for(len(trial.mean), options.block)
    exact = list(trial.run(trial.weights))
    losses = []
    for step in range(awq_math.STEPS):
        s = awq_math.factors(trial.mean, step / awq_math.STEPS)
        weights = []
        for stored, axis in zip(trial.weights, trial.inner, strict=True):
            w = stored if axis == 1 else stored.T
            value = awq_math.nearest(
                w.float() * s, options.bits, block, symmetric=options.symmetric
            )
            value = (value / s).to(stored.dtype)
            weights.append(value if axis == 1 else value.T)
        losses.append(_loss(exact, trial.run(weights)))
    best = min(range(awq_math.STEPS), key=losses.__getitem__)
    if best == 0:
        return Solved(info=info)
    alpha = best / awq_math.STEPS
    info |= {"alpha": alpha, "gain": losses[best] / losses[0]}
    return Solved(state={"factors": awq_math.factors(trial.mean, alpha).cpu()}, info=info)


def _loss(exact: Iterable[list[Tensor]], found: Iterable[list[Tensor]]) -> float:
    """Squared error of all ends in all batches."""
    total = 0.0
    for old, new in zip(exact, found, strict=True):
        for a, b in zip(old, new, strict=True):
            total += float(torch.linalg.vector_norm(b - a, dtype=torch.float64)) ** 2
    return total


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


def spread_batches(sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of batches, spread evenly, with not more than `limit` rows in all; at least one."""
    for count in range(len(sizes), 1, -1):
        kept = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        if sum(sizes[k] for k in kept) <= limit:
            return kept
    return [len(sizes) // 2]


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
    if layer.kind not in MATRICES:
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
