"""quantize.rtn: weights of 2 to 8 bits in blocks, each rounded to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.ir.select import Layer, select
from graphwright.ir.weights import PRODUCTS, weight_node, weight_value
from graphwright.ir.workers import Workers
from graphwright.passes.base import Action, Context, Options, Pass, Result
from graphwright.passes.quantize._blocks import Blocks, block_for, round_to_nearest
from graphwright.passes.quantize._insert import matrix_of, rebuild_blocks, replace_weight
from graphwright.passes.quantize._refusals import NO_MATRIX, refusals


class RtnOptions(Options):
    """Options of quantize.rtn."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a code."""

    block: Annotated[int, Field(ge=-1)] = 128
    """Weights of a row that share a scale; 0 or -1 for one scale per row. ONNX Runtime has kernels
    for powers of two from 16 on. Rows of less than half a block get a smaller one."""

    symmetric: bool = False
    """Put the zero point in the middle of the codes and store none; a little faster, and less
    accurate."""

    search: bool = False
    """Also try smaller ranges, down to 0.21 of the full one, and take for each block the one with
    the least sum of |error|^2.4."""

    embeddings: bool = True
    """Quantize embedding tables too, in blocks of each row."""

    targets: Selector = ("*",)
    """Layers to quantize: selector patterns over names and kinds."""

    max_error: Annotated[float, Field(gt=0)] | None = None
    """Largest relative error of the outputs, ||a-b|| / ||a||; no bound when absent."""


@dataclass(frozen=True)
class Job:
    """One matrix to round; plain data, so that it travels to a worker."""

    matrix: Tensor
    bits: int
    block: int
    symmetric: bool
    search: bool

    def run(self) -> tuple[Blocks, float]:
        """The rounded matrix and its relative error."""
        made = round_to_nearest(
            self.matrix, self.bits, self.block, symmetric=self.symmetric, search=self.search
        )
        size = float(self.matrix.double().norm())
        off = float((made.value().double() - self.matrix.double()).norm())
        return made, off / size if size > 0 else off


class Rtn(Pass):
    """Rounds every weight to the nearest of 2^bits values between the extremes of its block.

    A weight is cut into blocks along each output channel (each row of an embedding table). The
    range of a block, extended to hold zero, is divided into 2^bits - 1 steps, and the zero point
    is a whole number of them, so that zero stays zero. The weight becomes packed codes and
    `graphwright::dequantize_blocks`, which feeds the layer as before. Activations stay in float,
    and no data is needed; `quantize.gptq` and `quantize.awq` use data, and are more accurate.

    What cannot be quantized (transposed convolutions, weights that are not finite, or that a layer
    outside `targets` reads too) is left as it is, with the reason in the report. Memory: six times
    the largest weight.
    """

    contract = "lossy"
    Options = RtnOptions
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def run(self, program: Program, context: Context) -> Result:
        options: RtnOptions = self.options
        chosen = select(program, options.targets, {*PRODUCTS, *NO_MATRIX, "embedding"})
        refused = refusals(program, chosen, embeddings=options.embeddings)
        first: dict[fx.Node, Layer] = {}
        for layer in chosen:
            if layer.node not in refused:
                first.setdefault(weight_node(layer), layer)
        if not first:
            reasons = sorted({f"{layer.name}: {refused[layer.node]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        editor = Editor(program, by=self.id)
        workers = Workers(context.jobs)
        weights = list(first)
        done: dict[fx.Node, tuple[Blocks, float]] = {}
        for start in range(0, len(weights), workers.width):
            part = weights[start : start + workers.width]
            jobs = [self._job(program, first[weight]) for weight in part]
            for weight, made in zip(part, workers.map(Job.run, jobs), strict=True):
                done[weight] = made
                replace_weight(editor, first[weight], rebuild_blocks(made[0]))
        actions = [self._action(layer, refused, first, done) for layer in chosen]
        return Result(editor.finish(), tuple(actions), _metrics(done))

    def _job(self, program: Program, layer: Layer) -> Job:
        options: RtnOptions = self.options
        matrix = matrix_of(layer.kind, weight_value(program, layer))
        block = block_for(matrix.shape[1], options.block)
        return Job(matrix, options.bits, block, options.symmetric, options.search)

    def _action(
        self,
        layer: Layer,
        refused: dict[fx.Node, str],
        first: dict[fx.Node, Layer],
        done: dict[fx.Node, tuple[Blocks, float]],
    ) -> Action:
        if layer.node in refused:
            return Action(layer.name, "left alone", refused[layer.node])
        weight = weight_node(layer)
        blocks, error = done[weight]
        what = f"int{blocks.bits}, block {blocks.block}, relative error {error:.2e}"
        if first[weight].node is not layer.node:
            return Action(layer.name, what, f"shares the weight of {first[weight].name}")
        return Action(layer.name, what, _remark(blocks, self.options.block))


def _remark(blocks: Blocks, asked: int) -> str:
    """What is unusual about a weight's blocks."""
    if 0 < asked != blocks.block:
        return f"a smaller block: its rows have {blocks.columns} weights"
    if blocks.columns % blocks.block:
        return f"the last block of a row has {blocks.columns % blocks.block} weights"
    return ""


def _metrics(done: dict[fx.Node, tuple[Blocks, float]]) -> dict[str, float]:
    errors = [error for _, error in done.values()]
    weights = sum(blocks.codes.shape[0] * blocks.columns for blocks, _ in done.values())
    stored = sum(blocks.nbytes for blocks, _ in done.values())
    return {
        "weights": float(len(done)),
        "bits_per_weight": 8 * stored / weights,
        "weight_error_mean": sum(errors) / len(errors),
        "weight_error_max": max(errors),
    }
