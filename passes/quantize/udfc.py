"""quantize.udfc: weights become integer codes, and the next layers are repaired without data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import select
from graphwright.ir.program import Program
from graphwright.ir.repair.closed_form import Repair
from graphwright.ir.repair.options import RepairOptions
from graphwright.ir.repair.round import quantizable, quantized
from graphwright.ir.repair.walk import Plan, compress, metrics
from graphwright.passes.base import MATRICES, Context, Pass, Result


class UdfcOptions(RepairOptions):
    """Options of quantize.udfc."""

    bits: Annotated[int, Field(ge=2, le=8)] = 6
    """Bits of a weight code; codes are stored as int8."""

    repair: Repair = "auto"
    """The compensation of rounded channels: `ridge`, any mixture of the rounded ones, from the
    filters; `features`, any mixture, fitted to activations on Gaussian inputs; `diagonal`, they are
    only scaled; `auto`, all of these; `none`. Of every kind several strengths are tried, and what
    has the least error on other Gaussian inputs is taken, which may be to change nothing. `nonneg`
    is for pruned channels, and changes nothing here."""


class Udfc(Pass[UdfcOptions]):
    """Rounds weights to a symmetric grid per output channel, and repairs their readers.

    A rounded channel is taken for a mixture of the rounded channels of its layer; the mixture
    follows in closed form from the filters and the batch norm alone, and is multiplied into the
    layers that read the channels, before these are rounded themselves. A weight becomes int8 codes
    and `graphwright::dequantize`; activations stay in float. Run it before batch norms are folded:
    their statistics tell how the channels are distributed. With pruning in one solution: the
    option `weight_bits` of prune.udfc.

    Source: Bai et al. 2023, "Unified Data-Free Compression". The paper's code is not published:
    the assumption and the closed form (`ridge`) are the paper's; the shrinkage, `features`, and the
    choice among variants on Gaussian inputs are ours.
    """

    contract = "lossy"
    takes = MATRICES
    codes = MATRICES
    computes_in = ("float64", "float32")
    stores_weights = True
    papers = ("P69",)
    before = ("cleanup.fold_batch_norm",)  # batch norm tells how channels are distributed

    def run(self, program: Program, context: Context) -> Result:
        o: UdfcOptions = self.options
        weights, refused = quantizable(program, select(program, o.targets, PRODUCTS))
        if not weights:
            reasons = tuple(sorted({f"{a.layer}: {a.reason}" for a in refused}))
            raise ModelError(f"{self.id} can quantize none of its targets", details=reasons)
        plan = Plan(bits=o.bits, repair=o.repair, l1=o.offsets, l2=o.shrinkage,
                    search=o.search_scale)  # fmt: skip
        found = compress(program, context, plan, set(), weights)
        result, actions = quantized(found.program, self.id, o.targets, o.bits, o.search_scale,
                                    found)  # fmt: skip
        return Result(result, tuple(actions), metrics(program, found))
