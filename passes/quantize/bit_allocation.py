"""quantize.bit_allocation: which layer gets how many bits, by an integer program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from graphwright.ir.context import Context
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.cost import cost
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.products import weight_key, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Rule, Targets
from graphwright.ir.program import Program
from graphwright.ir.stored.transplant import mixed
from graphwright.ir.tune.losses import main_output
from graphwright.ir.work import Load, Work
from graphwright.passes.base import MATRICES, WEIGHTS, Action, Pass, Result
from graphwright.passes.inner import fits, inner_pass
from graphwright.passes.quantize._math.allocate import allocate
from graphwright.passes.registry import find_pass

ERROR_DAG = "analyze.error_dag"
"""The fact that holds influences by layer."""

LEAST = 1e-6
"""Smallest increase of the loss that a layer counts with (P47, the released code)."""


class BitAllocationOptions(Bounded, Targets):
    """Options of quantize.bit_allocation."""

    rules = (
        Rule("quantizer", "quantizer != 'quantize.bit_allocation'",
             "bit_allocation cannot quantize by itself"),
        Rule("measure", "measure != 'latency' or table is not None",
             "measure is latency, and no `table` is given"),
        Rule("loss", "sensitivity == 'measured' or 'loss' not in given",
             "loss has no part in sensitivity {sensitivity}"),
    )  # fmt: skip

    quantizer: str = "quantize.adaquant"
    """Pass that quantizes: any with the options `bits` and `targets`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Its other options."""

    bits: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], Field(min_length=2)] = (8, 4)
    """Widths to choose from. The largest is what a layer is compared with."""

    activations: bool = False
    """Whether a layer's inputs get the width of its weight (the quantizer's `activation_bits`)."""

    measure: Literal["size", "bit_ops", "latency"] = "size"
    """The bounded quantity: `size`, bits of the weights; `bit_ops`, multiply-accumulates times
    the bits of both operands; `latency`, from `table`."""

    budget: Annotated[float, Field(gt=0)] = 0.15
    """For `size`, a share of the weights in 32 bits: 0.25 is 8 bits for all, 0.125 is 4 (scales not
    counted). For `bit_ops`, a share of the operations at 32 bits. For `latency`, milliseconds."""

    table: str | None = None
    """For `latency`: a JSON file {"layer": {"8": milliseconds, "4": milliseconds}, ...} of what
    each layer takes at each width; relative to the spec's folder."""

    loss: Literal["kl", "mse", "cross_entropy"] = "kl"
    """The measure: `kl` of the outputs, as logits, from the model's own; `mse` of the outputs,
    relative to their size; `cross_entropy` with the labels of the calibration data."""

    sensitivity: Literal["measured", "error_dag"] = "measured"
    """Where a layer's increase comes from: `measured` one by one, in as many runs as there are
    layers and smaller widths; `error_dag`, the influences that `analyze.error_dag` has noted."""

    @model_validator(mode="after")
    def _quantizer_takes_its_options(self) -> Self:
        fits("quantizer", lambda: self.quantizer_of(self.bits[0]))
        return self

    def quantizer_of(self, bits: int) -> Pass:
        """The pass that quantizes to so many bits.

        Raises:
            ArgumentError: there is none of that name, or it does not take the options.
        """
        given = {**self.options, "bits": bits, "targets": list(self.targets)}
        if self.activations:
            if "activation_bits" not in find_pass(self.quantizer).Options.model_fields:
                raise ArgumentError(
                    f"{self.quantizer} quantizes no inputs",
                    fix="Leave `activations` out, or use quantize.adaquant.",
                )
            given["activation_bits"] = bits
        return inner_pass(self.quantizer, ("bits", "targets"), given,
                          "Use quantize.adaquant, quantize.gptq or quantize.rtn.")  # fmt: skip


class BitAllocation(Pass[BitAllocationOptions]):
    """Quantizes the program once per width, and mixes the layers within a budget at least loss.

    The loss of the network on the calibration data is measured with every layer in turn at every
    smaller width, all others at the largest (or follows from what `analyze.error_dag` has noted);
    an integer program then chooses one width per layer
    with the least sum of increases within the budget, and is solved exactly. That increases add up
    is an assumption; the loss of the mix is measured and reported beside their sum.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets",
    section 4.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = WEIGHTS
    codes = MATRICES
    stores_weights = True
    needs = "calibration"
    papers = ("P47",)
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        options = self.options
        work = super().cost(load)
        for bits in options.bits:
            work += options.quantizer_of(bits).cost(load)
        if options.sensitivity == "measured":
            runs = len(load.targeted(options.targets)) * (len(options.bits) - 1)
            work += load.forward(load.calibration).times(runs)
        return work

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        widths = sorted(set(options.bits), reverse=True)
        chosen = select(program, options.targets, PRODUCTS)
        made = {bits: self._quantized(program, bits, context) for bits in widths}
        base = made[widths[0]].program
        units = _units(chosen, program, base)
        judge = Judge(program, context.batches, options.loss)
        start = judge.loss(base)
        losses = (
            noted_losses(program, units, widths) if options.sensitivity == "error_dag"
            else self._measured(judge, base, made, units, widths, context)
        )  # fmt: skip
        costs, budget = _costs(program, units, widths, options, context.folder)
        picks = allocate(losses, costs, budget)
        result = mixed(
            base,
            [(u.nodes, made[widths[p]].program) for u, p in zip(units, picks, strict=True) if p],
            self.id,
        )  # fmt: skip
        actions = [a for a in made[widths[0]].actions if a.layer not in
                   {name for unit in units for name in unit.layers}]  # fmt: skip
        for unit, pick, increase in zip(units, picks, losses, strict=True):
            increases = ", ".join(f"{b} bits {x:.2e}" for b, x in
                                  zip(widths[1:], increase[1:], strict=True))  # fmt: skip
            actions += [Action(name, f"{widths[pick]} bits", f"loss would grow by {increases}")
                        for name in unit.layers]  # fmt: skip
        metrics = {
            "loss_at_most_bits": start,
            "loss": judge.loss(result),
            "expected_increase": float(losses[np.arange(len(units)), picks].sum()),
            "cost": float(costs[np.arange(len(units)), picks].sum()),
            "budget": budget,
        }
        return Result(result, tuple(actions), metrics)

    def _measured(
        self, judge: Judge, base: Program, made: Mapping[int, Result], units: Sequence[Unit],
        widths: Sequence[int], context: Context,
    ) -> np.ndarray:  # fmt: skip
        start = judge.loss(base)
        losses = np.zeros((len(units), len(widths)))
        for row, unit in enumerate(units):
            context.progress(f"sensitivity of {unit.name}", row + 1, len(units))
            for column, bits in enumerate(widths[1:], 1):
                other = mixed(base, [(unit.nodes, made[bits].program)], self.id)
                losses[row, column] = max(judge.loss(other) - start, LEAST)
        return losses

    def _quantized(self, program: Program, bits: int, context: Context) -> Result:
        quantizer: Pass = self.options.quantizer_of(bits)
        return quantizer.run(program, context.within(bits))


@dataclass(frozen=True)
class Unit:
    """Layers that get their width together: those of one weight.

    Attributes:
        name: of the first.
        layers: all names.
        nodes: names of their calls.
        values: weights that they hold.
    """

    name: str
    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    values: int


def _units(chosen: Sequence[Layer], program: Program, base: Program) -> list[Unit]:
    """The quantized layers, tied ones together.

    Raises:
        ModelError: the quantizer has quantized none.
    """
    stored = {layer.node.name: layer for layer in select(base, ["*"], PRODUCTS)}
    groups: dict[str, list[Layer]] = {}
    for layer in chosen:
        twin = stored.get(layer.node.name)
        if twin is not None and twin.weight != layer.weight:
            groups.setdefault(weight_key(layer), []).append(layer)
    if not groups:
        raise ModelError("the quantizer has quantized none of the targets")
    return [
        Unit(
            group[0].name,
            tuple(layer.name for layer in group),
            tuple(layer.node.name for layer in group),
            int(weight_node(group[0]).meta["val"].numel()),
        )
        for group in groups.values()
    ]


def noted_losses(program: Program, units: Sequence[Unit], widths: Sequence[int]) -> np.ndarray:
    """(units, widths): growth of the output's squared error, relative to that at the largest width.

    A bit less doubles a layer's error, and the output's grows by 2 ** influence.

    Raises:
        ArgumentError: no influences are noted, or those of a layer are missing.
    """
    noted = program.facts.get(ERROR_DAG)
    if noted is None:
        raise ArgumentError(
            "sensitivity is error_dag, and the program has no influences",
            fix=f"Put {ERROR_DAG} in front, behind every pass that changes layers.",
        )
    known = noted["influence"]
    rows = []
    for unit in units:
        named = [known[name] for name in unit.layers if name in known]
        if not named:
            raise ArgumentError(
                f"{ERROR_DAG} has noted no influence of {unit.name!r}",
                fix="Give both passes the same `targets`.",
            )
        lost = np.array([widths[0] - bits for bits in widths], float)
        rows.append(np.maximum(4.0 ** (max(named) * lost) - 1, np.where(lost > 0, LEAST, 0)))
    return np.stack(rows)


def _costs(
    program: Program, units: Sequence[Unit], widths: Sequence[int],
    options: BitAllocationOptions, folder: Path,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """(units, widths), and the budget in the same unit."""
    bits = np.array(widths, float)
    if options.measure == "latency":
        return _table(units, widths, options.table, folder), options.budget
    if options.measure == "size":
        sizes = np.array([float(unit.values) for unit in units])
        return sizes[:, None] * bits, options.budget * 32 * float(sizes.sum())
    macs = {layer.node: float(layer.macs or 0) for layer in cost(program).layers}
    work = np.array([sum(macs.get(node, 0.0) for node in unit.nodes) for unit in units])
    operand = bits if options.activations else np.full(len(widths), 32.0)
    return work[:, None] * bits * operand, options.budget * 32**2 * float(work.sum())


def _table(
    units: Sequence[Unit], widths: Sequence[int], name: str | None, folder: Path
) -> np.ndarray:
    assert name is not None  # the options' own rule
    path = folder / name
    try:
        table = json.loads(path.read_text())
        return np.array([[float(table[u.name][str(b)]) for b in widths] for u in units])
    except OSError as error:
        raise ArgumentError(f"cannot read the latency table: {error}", where=str(path)) from None
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"the latency table is malformed: {error}", where=str(path)) from None
    except KeyError as error:
        raise ArgumentError(
            f"the latency table has no entry {error}", where=str(path),
            fix="It must hold every layer at every width.",
        ) from None  # fmt: skip


class Judge:
    """Measures a version of a program on the calibration data."""

    def __init__(self, program: Program, batches: Iterable[Any], loss: str) -> None:
        self.kind = loss
        self.batches = list(as_batches(batches, program.signature).labelled())
        if not self.batches:
            raise ArgumentError("the calibration data is empty", fix="Give at least one batch.")
        if loss == "cross_entropy" and any(labels is None for _, labels in self.batches):
            raise ArgumentError(
                "loss is cross_entropy, and the calibration data has no labels",
                fix="Add a `labels` column, or use loss: kl.",
            )
        self.output = main_output(program.signature)
        self.wanted = [self._outputs(program, inputs) for inputs, _ in self.batches]

    def loss(self, program: Program) -> float:
        """Mean over all samples, in float64."""
        total = weight = 0.0
        for (inputs, labels), wanted in zip(self.batches, self.wanted, strict=True):
            found = self._outputs(program, inputs)
            part, count = self._one(found.double(), wanted.double(), labels)
            total, weight = total + part, weight + count
        return total / max(weight, 1e-30)

    def _outputs(self, program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return program.run_flat(program.bind(**inputs))[self.output].float()

    def _one(self, found: Tensor, wanted: Tensor, labels: Tensor | None) -> tuple[float, float]:
        if self.kind == "mse":
            return float((found - wanted).square().sum()), float(wanted.square().sum())
        rows = found.reshape(-1, found.shape[-1])
        if labels is not None and self.kind == "cross_entropy":
            loss = torch.nn.functional.cross_entropy(rows, labels.reshape(-1), reduction="sum")
        else:
            target = wanted.reshape(-1, wanted.shape[-1]).log_softmax(-1)
            loss = torch.nn.functional.kl_div(
                rows.log_softmax(-1), target, reduction="sum", log_target=True
            )
        return float(loss), float(len(rows))
