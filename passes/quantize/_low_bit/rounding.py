"""Parts shared by passes that cut weights into blocks: options, and rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.calibration.site import Solved
from graphwright.ir.calibration.spill import Spill
from graphwright.ir.calibration.workers import Workers
from graphwright.ir.files.mapped import IN_MEMORY
from graphwright.ir.layers.kinds import TABLES
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.ops.blocks import PIECE
from graphwright.ir.options import Bounded, Targets, also
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import Blocks, block_for, round_to_nearest
from graphwright.ir.stored.insert import matrix_of


class BlockOptions(Bounded, Targets):
    """Options of every pass that rounds weights in blocks."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a code."""

    block: Annotated[int, Field(ge=-1, validation_alias=also("block", "group_size"))] = 128
    """Weights of a row that share a scale; 0 or -1 for one scale per row. 128 is what papers use;
    32 is more exact, and what ONNX Runtime's CPU kernels are fastest with: they take powers of two
    from 16 on. Rows of less than half a block get a smaller one."""

    symmetric: Annotated[bool, Field(validation_alias=also("symmetric", "sym"))] = False
    """Grids around zero, without stored zero points: a little faster, and less accurate."""

    embeddings: bool = True
    """Round embedding tables too: to nearest, in blocks of each row."""

    embedding_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of embedding tables, and of a language model's head where it shares the table: both feel
    rounding more than other layers. As `bits` when absent."""

    def bits_of(self, is_table: bool) -> int:
        """Bits of a weight's codes; `is_table` where an embedding reads it."""
        return self.bits if self.embedding_bits is None or not is_table else self.embedding_bits


@dataclass(frozen=True)
class _Job:
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
        size, off = _norms(self.matrix, made)
        return made, off / size if size > 0 else off


def _norms(matrix: Tensor, made: Blocks) -> tuple[float, float]:
    """Norms of a matrix and of its error in float64, some rows at a time."""
    rows = max(1, PIECE // max(made.columns, 1))
    squares = torch.zeros(2, dtype=torch.float64)
    for part, of_part in zip(matrix.split(rows), made.split(rows), strict=True):
        wide = part.double()
        squares += torch.stack([wide.norm(), (of_part.value().double() - wide).norm()]).square()
    size, off = squares.sqrt().tolist()
    return size, off


def round_layers(
    program: Program,
    layers: Sequence[Layer],
    options: BlockOptions,
    jobs: int | str,
    *,
    search: bool = False,
) -> dict[fx.Node, tuple[Blocks, float]]:
    """Every weight rounded to nearest, and its relative error, by the node of the weight.

    Args:
        program: that the layers were found in.
        layers: each weight is rounded once, whoever shares it.
        options: of the grid.
        jobs: as for `Workers`; as many weights are at hand at a time.
        search: as for `round_to_nearest`.
    """
    first: dict[fx.Node, Layer] = {}
    for layer in layers:
        first.setdefault(weight_node(layer), layer)
    tables = {weight_node(layer) for layer in layers if layer.kind in TABLES}
    weights, workers, spill = list(first), Workers(jobs), Spill(IN_MEMORY)
    found: dict[fx.Node, tuple[Blocks, float]] = {}
    for start in range(0, len(weights), workers.width):
        part = weights[start : start + workers.width]
        tasks = []
        for weight in part:
            matrix = matrix_of(first[weight].kind, weight_value(program, first[weight]))
            block = block_for(matrix.shape[1], options.block)
            bits = options.bits_of(weight in tables)
            tasks.append(_Job(matrix, bits, block, options.symmetric, search))
        for weight, (made, error) in zip(part, workers.map(_Job.run, tasks), strict=True):
            found[weight] = made.through(spill.put), error
    return found


def solved(blocks: Blocks, weight: Tensor | None = None, **info: float) -> Solved:
    """Codes as what a method of `ir.calibration.walk` hands back; `blocks_of` reads them."""
    state = {"codes": blocks.codes, "scale": blocks.scale}
    if blocks.zero_point is not None:
        state["zero_point"] = blocks.zero_point
    sizes = {name: float(getattr(blocks, name)) for name in ("bits", "block", "columns")}
    return Solved(weight=weight, state=state, info={**sizes, **info})


def blocks_of(found: Solved) -> Blocks:
    """The codes that `solved` kept."""
    info = found.info
    # The matrices of a stack of experts lie one below the other.
    state = {key: t.flatten(0, 1) if found.parts else t for key, t in found.state.items()}
    bits, block, columns = (int(info[name]) for name in ("bits", "block", "columns"))
    return Blocks(state["codes"], state["scale"], state.get("zero_point"), bits, block, columns)
