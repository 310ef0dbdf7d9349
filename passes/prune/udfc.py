"""prune.udfc: channels go, and the layers that read them are repaired without any data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import only_with
from graphwright.ir.program import Program
from graphwright.ir.repair.options import RepairOptions
from graphwright.ir.repair.round import quantizable, quantized
from graphwright.ir.repair.walk import Compressed, Plan, compress, metrics, repair_text
from graphwright.ir.work import STRUCTURAL, Load, Work
from graphwright.passes.base import Action, Context, Effect, Pass, Result


class UdfcOptions(RepairOptions):
    """Options of prune.udfc."""

    rules = tuple(
        only_with(name, "repair", ["merge"]) for name in ("merge_balance", "merge_threshold")
    )

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the output channels of every layer that goes, rounded down."""

    weight_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of weight codes; the weights stay as they are when absent. Rounding and pruning are
    repaired by one solution."""

    norm: Literal["l1", "l2"] = "l2"
    """Norm of a channel's filter, batch norm included, by which the smallest go."""

    merge_balance: Annotated[float, Field(ge=0, le=1)] = 0.85
    """For `merge`: how much the directions of two filters count in the choice of the kept channel,
    beside the offsets that batch norm gives them. The paper's code has 0.7 to 0.85, by model.
    Without a batch norm the offset is a part of the direction."""

    merge_threshold: Annotated[float, Field(ge=0, le=1)] = 0.1
    """For `merge`: smallest cosine of two filters that are merged. The paper's code has 0.1 for
    convolutions with batch norm, 0.45 for linear layers."""


class Udfc(Pass[UdfcOptions]):
    """Removes the channels with the smallest filters, and repairs the next layer in closed form.

    A lost channel is taken to be a mixture of the kept ones of its layer; the mixture follows from
    the filters and the batch norm alone, and is multiplied into the layers that read the channels.
    `ridge` and `nonneg` compare filters; `features` compares what the activation makes of Gaussian
    inputs with the means and deviations that the batch norm knows, and mostly wins under `auto`.
    Works where one layer's channels reach other layers through batch norm, activation and pooling:
    chains, and the inside of residual blocks. Run it before batch norms are folded: their
    statistics tell how the channels are distributed. With `weight_bits`, all selected weights
    become integer codes with a scale per output channel as well.

    With `repair: merge` it is Neuron Merging instead, a baseline: every lost channel is added to
    the one kept channel whose filter is nearest in direction and, behind a batch norm, in offset,
    times the ratio of their norms. It is done as published, without a trial; where the activation
    is not positively homogeneous, or a depthwise convolution reads the channels, they are only
    lost. Rounding is not repaired by it. The filters compared are those that the repairs before
    have left, the paper's code takes the original ones.

    Source: Bai et al. 2023, "Unified Data-Free Compression". The paper's code is not published:
    the assumption and the closed form (`ridge`) are the paper's; the shrinkage, the non-negative
    variant, `features`, and the choice among variants on Gaussian inputs are ours. `merge`: Kim et
    al. 2020, "Neuron Merging: Compensating for Pruned Neurons", section 3.
    """

    contract = "lossy"
    papers = ("P69",)
    before = ("quantize.*", "cleanup.fold_batch_norm")

    def cost(self, load: Load) -> Work:
        return super().cost(load) + Work(edited=STRUCTURAL * load.nodes)

    def run(self, program: Program, context: Context) -> Result:
        o: UdfcOptions = self.options
        chosen = select(program, o.targets, PRODUCTS)
        names = {layer.name for layer in chosen}
        weights = quantizable(program, chosen)[0] if o.weight_bits is not None else set()
        plan = Plan(o.ratio, o.weight_bits, o.repair, o.offsets, o.shrinkage, o.norm,
                    o.search_scale, o.merge_balance, o.merge_threshold)  # fmt: skip
        found = compress(program, context, plan, names, weights)
        actions = _actions(found, chosen)
        result = found.program
        if o.weight_bits is not None:
            result, more = quantized(
                result, self.id, o.targets, o.weight_bits, o.search_scale, found
            )
            actions += more
        effect: Effect = "reformed" if o.weight_bits is None else "compressed"
        return Result(result, tuple(actions), metrics(program, found), effect=effect)


def _actions(found: Compressed, chosen: list[Layer]) -> list[Action]:
    """The report on the output channels of every selected layer."""
    actions = []
    for layer in chosen:
        done = found.done.get(layer.name)
        if done is None:
            actions.append(Action.left(layer.name, found.reason(layer), "kept"))
        elif done.kept == done.units:
            actions.append(Action.left(layer.name, "the ratio is less than one channel", "kept"))
        else:
            kept = f"cut to {done.kept} of {done.units} channels"
            actions.append(Action(layer.name, f"{kept}, {repair_text(done)}"))
    return actions
