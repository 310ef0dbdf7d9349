"""quantize.rtn: weights of 2 to 8 bits in blocks, each rounded to the nearest code."""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.ir.edit import Editor
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import Blocks
from graphwright.ir.stored.insert import Make, rebuild_blocks
from graphwright.passes.base import WEIGHTS, Action, Context, Pass, Result
from graphwright.passes.quantize._low_bit.coding import choose, insert
from graphwright.passes.quantize._low_bit.rounding import BlockOptions, round_layers


class RtnOptions(BlockOptions):
    """Options of quantize.rtn."""

    search: bool = False
    """Also try smaller ranges, down to 0.21 of the full one, and take for each block the one with
    the least sum of |error|^2.4."""


class Rtn(Pass[RtnOptions]):
    """Rounds every weight to the nearest of 2^bits values between the extremes of its block.

    A weight is cut into blocks along each output channel (each row of an embedding table). The
    range of a block, extended to hold zero, is divided into 2^bits - 1 steps, and the zero point
    is a whole number of them, so that zero stays zero. The weight becomes packed codes and
    `graphwright::dequantize_blocks`, which feeds the layer as before. Activations stay in float,
    and no data is needed; `quantize.gptq` and `quantize.awq` use data, and are more accurate.

    Every weight of a recurrent call (`lstm.weight_ih_l0`) is one of its own; so are the operands of
    an einsum. What cannot be quantized (weights that are not finite, or that a layer outside
    `targets` reads too) is left as it is, with the reason in the report. Memory: what
    stands between weights and codes, for four million weights at a time; codes beyond 256 MB are
    in mapped files.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = WEIGHTS
    codes = WEIGHTS
    stores_weights = True
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        layers, actions = choose(program, self.id, options.targets, embeddings=options.embeddings)
        rounded = round_layers(program, layers, options, context.jobs, search=options.search)

        def find(layer: Layer) -> tuple[Make, Action]:
            blocks, error = rounded[weight_node(layer)]
            what = f"int{blocks.bits}, block {blocks.block}, relative error {error:.2e}"
            return rebuild_blocks(blocks), Action(layer.name, what, _remark(blocks, options.block))

        editor = Editor(program, by=self.id)
        actions += insert(editor, layers, find)
        return Result(editor.finish(), tuple(actions), _metrics(list(rounded.values())))


def _remark(blocks: Blocks, asked: int) -> str:
    """A remark on a weight's blocks."""
    if 0 < asked != blocks.block:
        return f"a smaller block: its rows have {blocks.columns} weights"
    if blocks.columns % blocks.block:
        return f"the last block of a row has {blocks.columns % blocks.block} weights"
    return ""


def _metrics(done: Sequence[tuple[Blocks, float]]) -> dict[str, float]:
    errors = [error for _, error in done]
    weights = sum(blocks.codes.shape[0] * blocks.columns for blocks, _ in done)
    stored = sum(blocks.nbytes for blocks, _ in done)
    return {
        "weights": float(len(done)),
        "bits_per_weight": 8 * stored / weights,
        "weight_error_mean": sum(errors) / len(errors),
        "weight_error_max": max(errors),
    }
