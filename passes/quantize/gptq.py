"""quantize.gptq: 2 to 8 bit weights whose rounding errors make up for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.calibration.hessian import Hessian, hessian, inverse_factor
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import PRODUCTS, TABLES
from graphwright.ir.layers.products import as_matrix, from_matrix, weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.layers.selectors import layers as find_layers
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import Blocks, block_for, pack, round_to_nearest
from graphwright.ir.stored.insert import Make, rebuild_blocks
from graphwright.ir.work import Load, Work
from graphwright.passes.base import WEIGHTS, Action, Context, Pass, Result
from graphwright.passes.quantize._low_bit.coding import (
    choose,
    insert,
    layer_errors,
    output_error,
    uncalibrated,
)
from graphwright.passes.quantize._low_bit.rounding import (
    BlockOptions,
    blocks_of,
    round_layers,
    solved,
)
from graphwright.passes.quantize._math.gptq import GptqSettings, Rounded, round_matrix


class GptqOptions(BlockOptions):
    """Options of quantize.gptq."""

    rules = (
        Rule("act_order", "not act_order or static_groups or block <= 0",
             "act_order takes static_groups: true (or block: -1): with scales found on the way, "
             "the inputs of a block would no longer lie side by side"),
    )  # fmt: skip

    act_order: bool = False
    """Round the inputs with the largest activations first, while there is most left to make up
    for it. Needs `static_groups`, or `block: -1`."""

    static_groups: bool = False
    """Scales from the weights as they were; else each block's from what the errors of the blocks
    before it have made of it."""

    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it; raised tenfold up to three
    times where the Hessian is singular even so."""

    search: bool = False
    """Try smaller ranges for every scale and take the least sum of |w - q|^2.4."""

    sequential: bool = True
    """Calibrate every layer on what the quantized layers before it give; else all layers on the
    activations of the program as it was, and as many at a time as there are jobs."""

    keep_zeros: bool = False
    """Weights that are exactly zero stay zero: for programs that were pruned before."""

    least_rows: Annotated[int, Field(ge=1)] = 16
    """Rows of activations that a layer must have seen; with fewer it is rounded to nearest."""

    def settings(self, columns: int, dtype: torch.dtype) -> GptqSettings:
        """The grid of a matrix with that many columns, its scales stored in `dtype`."""
        return GptqSettings(
            self.bits,
            block_for(columns, self.block),
            self.symmetric,
            self.static_groups or self.block < 1,
            self.act_order,
            self.search,
            self.keep_zeros,
            dtype,
        )


class Gptq(Pass[GptqOptions]):
    """Quantizes weights to 2 to 8 bits, input by input, each error spread over the inputs to come.

    A layer's weight is rounded column by column. What a column's rounding changes in the layer's
    outputs is made up for, as far as it can be, by the columns not yet rounded: the update of
    optimal brain surgery under H = mean of x x^T over the calibration data. Weights become codes
    with a scale and a zero point for every block of inputs (`graphwright::dequantize_blocks`);
    activations stay as they are. Convolutions are rounded as products with their windows, grouped
    ones group by group. Embedding tables, recurrent layers, bilinear ones and einsums have no such
    product, and are rounded to nearest.

    An input that is zero on all calibration data has its weights rounded to nearest; the paper's
    code sets them to zero. Where a block is shorter than 128 the paper's code finds its scale
    from weights that lack the updates of their own stretch of 128 columns; here they have them.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", algorithm 1.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = WEIGHTS
    codes = WEIGHTS
    stores_weights = True
    needs = "calibration"
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.hessians(layers) + load.columns(layers)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        layers, actions = choose(program, self.id, options.targets, embeddings=options.embeddings)
        # Tables first: the layers are then calibrated on what the rounded tables give.
        coded = options.embedding_bits is not None
        shared = {weight_node(layer) for layer in layers if coded and layer.kind in TABLES}
        products = [
            layer for layer in layers
            if layer.kind in PRODUCTS and weight_node(layer) not in shared
        ]  # fmt: skip
        read = {weight_node(layer) for layer in products}
        tables = [layer for layer in layers if layer not in products]
        alone = [table for table in tables if weight_node(table) not in read]
        editor = Editor(program, by=self.id)
        actions += self._tables(editor, program, alone, context.jobs)
        if not products:
            return Result(editor.finish(), tuple(actions))
        rounded = editor.finish()
        names = {layer.node.name for layer in products}
        start = rounded if options.sequential else program
        found = sweep(
            start,
            [layer for layer in find_layers(start, PRODUCTS) if layer.node.name in names],
            context.batches,
            Rounding(options),
            context,
            follow="solved" if options.sequential else "program",
        )
        editor = Editor(rounded, by=self.id)
        tied = [table for table in tables if weight_node(table) in read]
        actions += insert(
            editor, [*products, *tied], lambda layer: self._product(layer, found[layer.node.name]),
            f"int{options.bits}",
        )  # fmt: skip
        errors = [each.info["error"] for each in found.values()]
        return Result(editor.finish(), tuple(actions), layer_errors(errors))

    def _tables(
        self, editor: Editor, program: Program, tables: Sequence[Layer], jobs: int | str
    ) -> list[Action]:
        """Rounds what no product is calibrated for to nearest."""
        options = self.options
        rounded = round_layers(program, tables, options, jobs, search=options.search)

        def find(layer: Layer) -> tuple[Make, Action]:
            blocks, error = rounded[weight_node(layer)]
            what = f"int{blocks.bits}, block {blocks.block}, relative error {error:.2e}"
            what_it_is = "tied to a table" if layer.kind in PRODUCTS else uncalibrated(layer)
            reason = f"{what_it_is}: rounded to nearest"
            return rebuild_blocks(blocks), Action(layer.name, what, reason)

        return insert(editor, tables, find, f"int{options.bits_of(True)}")

    def _product(self, layer: Layer, found: Solved) -> tuple[Make, Action]:
        """A layer that the sweep has solved."""
        info, blocks = found.info, blocks_of(found)
        what = f"int{blocks.bits}, block {blocks.block}, relative error {info['error']:.2e}"
        reason = ""
        if info["nearest"]:
            reason = f"only {int(info['rows'])} rows of calibration data: rounded to nearest"
        elif info["damping"] > self.options.damping:
            reason = f"its Hessian is singular: damping raised to {info['damping']:g}"
        return rebuild_blocks(blocks), Action(layer.name, what, reason)


@dataclass(frozen=True)
class Rounding:
    """GPTQ of one layer after the other, see `ir.calibration.walk`."""

    options: GptqOptions

    def gather(self, site: Site) -> Hessian:
        """The second moments that all layers of the site share."""
        return hessian(site.rows())

    def solve(self, task: Task) -> Solved:
        """The layer's codes, and the weight that they stand for."""
        stats: Hessian = task.stats
        matrices = as_matrix(task.geometry, task.weight).float()
        settings = self.options.settings(task.geometry.depth, task.weight.dtype)
        is_nearest = stats.count < self.options.least_rows
        dampings = [self.options.damping]

        def factor(h: Tensor) -> Tensor:
            upper, used = inverse_factor(h, self.options.damping, task.name)
            dampings.append(used)
            return upper

        if is_nearest:
            matrix = as_matrix(task.geometry, task.weight).flatten(0, 1).cpu()
            blocks = round_to_nearest(
                matrix, settings.bits, settings.block,
                symmetric=settings.symmetric, search=settings.search,
            )  # fmt: skip
        else:
            pairs = zip(matrices, stats.matrix, strict=True)
            parts = [round_matrix(w, h, factor, settings) for w, h in pairs]
            blocks = packed(together(parts), settings)
        value = blocks.value().to(task.weight.device).reshape(matrices.shape)
        return solved(
            blocks,
            from_matrix(task.geometry, value),
            error=output_error(matrices, value.float(), stats.matrix),
            rows=float(stats.count),
            nearest=float(is_nearest),
            damping=max(dampings),
        )


def together(parts: Sequence[Rounded]) -> Rounded:
    """The matrices of all groups, one below the other."""
    return Rounded(
        torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]),
        torch.cat([p.zero for p in parts]), sum(p.loss for p in parts),
    )  # fmt: skip


def packed(rounded: Rounded, settings: GptqSettings) -> Blocks:
    """A rounded matrix in storage, on the CPU."""
    zero = None if settings.symmetric else rounded.zero.to("cpu", torch.uint8)
    scale = rounded.scale.to("cpu", settings.dtype)
    return pack(rounded.codes.cpu(), scale, zero, settings.bits, settings.block)
