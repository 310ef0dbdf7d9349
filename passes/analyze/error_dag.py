"""analyze.error_dag: which layer's error explains which other layer's, and the output's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.calibration.observe import bound_batches
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Options, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune.losses import main_output
from graphwright.passes.analyze._math.colide import (
    Array,
    covariance,
    free,
    restricted,
    total_effects,
)
from graphwright.passes.base import Action, Context, Contract, Effect, Need, Pass, Result

WIDTHS = (3.0, 8.0)
"""Bits that a trial rounds a layer's weight to, any number between."""

STRENGTH = math.log(2) * (WIDTHS[1] - WIDTHS[0]) / math.sqrt(12)
"""Deviation of the logarithm of a step, over the trials."""

SUGGESTED = (2, 8)
"""Least and most bits of a suggestion."""

LEAST = 1e-3
"""Least share of the output's error that a suggestion counts with."""

NAMED = 3
"""Other layers that a report names at each."""


class ErrorDagOptions(Options):
    """Options of analyze.error_dag."""

    targets: Selector = ("*",)
    """Layers that are looked at: selector patterns over names and kinds."""

    trials: Annotated[int, Field(ge=8)] = 96
    """Runs of the first calibration batch, each with other errors in all layers."""

    variance: Literal["own", "equal"] = "own"
    """Whether every layer has a noise scale of its own (the paper's NV) or all share one (EV)."""

    penalty: Annotated[float, Field(ge=0)] = 0.05
    """Factor of the sum of absolute weights, lambda."""

    bits: Annotated[float, Field(ge=2, le=8)] = 4.0
    """Mean width of the suggestion, in bits."""

    check_order: bool = False
    """Learn the graph a second time with edges anywhere, and report how many of them run with the
    order of execution; takes seconds for ten layers, and minutes for fifty."""


class ErrorDag(Pass[ErrorDagOptions]):
    """Learns from trials how errors of layers add to those of layers behind them.

    In every trial the weight of each layer gets noise as wide as rounding to a random number of
    bits from 3 to 8 makes; the logarithm of the relative error of its output is the layer's
    variable, and that of the program's main output the last one. CoLiDE finds weights W and noise
    scales with X = W^T X + Z: W_ij is how much of the error of layer i arrives in layer j, per
    factor, and the scale is what j adds of its own. The paper learns which edges there are; here
    the graph says it, so that an edge is possible only where j is reachable from i, and what is
    left is a convex problem.

    What varies in a layer's own error is its step, so that its noise scale over the deviation of
    the step's logarithm is the part of its error that it makes itself. Times the total effect on
    the output, over all ways, that is the layer's influence t: a bit less makes the output's
    squared error 4^t times as large, and influences of all layers sum to about 1. A width is
    suggested from it: half the binary logarithm of the influence above the mean.
    `quantize.bit_allocation` takes the influences with `sensitivity: error_dag`. The program stays
    as it is.

    Source: P81, "CoLiDE: Concomitant Linear DAG Estimation", with the support restricted. A linear
    model of logarithms is coarse: it holds about the widths that the trials have.
    """

    papers = ("P81",)
    contract: ClassVar[Contract] = "exact"
    needs: ClassVar[Need] = "calibration"
    weights: ClassVar[Effect | None] = "kept"
    after = ("cleanup.*", "cast.*", "prune.*", "tune.*")
    before = ("quantize.bit_allocation",)

    def run(self, program: Program, context: Context) -> Result:
        """Learns the graph and notes it in the program's facts.

        Raises:
            ModelError: fewer than two chosen layers have weights that trials can change.
            ArgumentError: an output of the program, or of a layer, is 0 throughout.
        """
        options = self.options
        chosen, left = _chosen(program, options.targets)
        if len(chosen) < 2:
            raise ModelError(
                f"{self.id}: {len(chosen)} chosen layers have float weights of their own, and a "
                "graph of errors needs two",
                details=tuple(f"{a.layer}: {a.reason}" for a in left[:5]),
            )
        x = trial_errors(program, chosen, options.trials, context)
        support = reachable(program, chosen)
        c = covariance(x)
        w, sigma = restricted(c, support, options.penalty, options.variance)
        influence = np.maximum(total_effects(w)[:-1, -1], 0.0) * sigma[:-1] / STRENGTH
        bits = suggested(influence, options.bits)
        names = [layer.name for layer in chosen]
        actions = [
            _said(names, index, w, sigma, influence, bits[index]) for index in range(len(names))
        ]
        metrics = {"layers": float(len(names)), "edges": float((w != 0).sum()),
                   "explained": 1 - float(sigma[-1] ** 2 / max(c[-1, -1], 1e-30))}  # fmt: skip
        if options.check_order:
            metrics |= order_metrics(c, support, options.penalty, options.variance)
        editor = Editor(program, by=self.id)
        editor.facts[self.id] = {
            "influence": {n: float(v) for n, v in zip(names, influence, strict=True)},
            "bits": {n: int(b) for n, b in zip(names, bits, strict=True)},
        }
        editor.changed = True
        return Result(editor.finish(), (*actions, *left), metrics)


def _chosen(program: Program, targets: tuple[str, ...]) -> tuple[list[Layer], list[Action]]:
    """Layers with a float weight of their own, the first one of each weight; and the others."""
    found: list[Layer] = []
    left, seen = [], set()
    for layer in select(program, targets, PRODUCTS):
        weight = program.state.get(layer.weight) if layer.weight else None
        if weight is None or not weight.is_floating_point():
            left.append(Action.left(layer.name, "its weight is computed in the graph"))
        elif layer.weight in seen:
            left.append(Action.left(layer.name, "its weight is another layer's too"))
        else:
            seen.add(layer.weight)
            found.append(layer)
    return found, left


def trial_errors(
    program: Program, chosen: list[Layer], trials: int, context: Context
) -> Array:  # fmt: skip
    """(trials, layers + 1): log of the relative error of each layer's output, the main one last."""
    inputs = next(iter(bound_batches(program, context.batches)), None)
    if inputs is None:
        raise ArgumentError("the calibration data is empty", fix="Give at least one batch.")
    outputs: Any = program.graph.output_node().args[0]
    main = outputs[main_output(program.signature)]
    nodes = [*(layer.node.name for layer in chosen), main.name]
    with torch.no_grad():
        wanted = _values(program, nodes, inputs)
        for name, value in wanted.items():
            if not bool(value.abs().max() > 0):
                raise ArgumentError(
                    f"analyze.error_dag: {name!r} is 0 on the first calibration batch, and no "
                    "error is relative to that",
                    fix="Put another batch first, or leave the layer out of `targets`.",
                )
        rows = np.zeros((trials, len(nodes)))
        for trial in range(trials):
            context.progress("trials", trial, trials)
            noisy = _noisy(program, chosen, context.generator("trial", trial))
            found = _values(program.replace(state=noisy), nodes, inputs)
            for column, name in enumerate(nodes):
                error = (found[name] - wanted[name]).norm() / wanted[name].norm()
                rows[trial, column] = np.log(max(float(error), 1e-12))
    return rows


def _noisy(program: Program, chosen: list[Layer], generator: torch.Generator) -> dict[str, Tensor]:
    """The state with every chosen weight off by what rounding to some random width makes."""
    state = dict(program.state)
    for layer in chosen:
        weight = state[layer.weight].detach()
        low, high = WIDTHS
        bits = low + (high - low) * float(torch.rand((), generator=generator))
        step = float(weight.abs().max()) / 2 ** (bits - 1)
        noise = torch.rand(weight.shape, generator=generator).to(weight) - 0.5
        state[layer.weight] = weight + step * noise
    return state


class _Tapped(fx.Interpreter):
    """Keeps the values of some nodes, in float64."""

    def __init__(self, program: Program, wanted: set[str]) -> None:
        super().__init__(program.module)
        self.wanted, self.kept = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = value.double()
        return value


def _values(program: Program, nodes: list[str], inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    tapped = _Tapped(program, set(nodes))
    tapped.run(*inputs)
    return tapped.kept


def reachable(program: Program, chosen: list[Layer]) -> np.ndarray:
    """(layers + 1, layers + 1) bool: whether column j is behind row i; the main output is last."""
    place = {layer.node.name: index for index, layer in enumerate(chosen)}
    behind: dict[fx.Node, frozenset[int]] = {}
    found = np.zeros((len(chosen) + 1,) * 2, bool)
    for node in program.graph.nodes:
        sources = frozenset().union(*(behind[source] for source in node.all_input_nodes))
        index = place.get(node.name)
        if index is not None:
            found[list(sources), index] = True
            sources |= {index}
        behind[node] = sources
    outputs: Any = program.graph.output_node().args[0]
    found[list(behind[outputs[main_output(program.signature)]]), -1] = True
    return found


def suggested(influence: Array, mean: float) -> np.ndarray:
    """Whole bits per layer: `mean` and half the binary logarithm of each influence above theirs."""
    spread = np.log2(np.maximum(influence, LEAST)) / 2
    found: np.ndarray = np.clip(np.round(mean + spread - spread.mean()), *SUGGESTED).astype(int)
    return found


def order_metrics(c: Array, support: np.ndarray, penalty: float, variance: Any) -> dict[str, float]:
    """How many edges CoLiDE finds without the graph, and the share of them that runs with it."""
    size = np.sqrt(np.maximum(np.diag(c), 1e-30))
    w, _ = free(c / np.outer(size, size), penalty, variance)
    edges = w != 0
    share = float((edges & support).sum() / max(edges.sum(), 1))
    return {"free_edges": float(edges.sum()), "free_edges_in_order": share}


def _said(
    names: list[str], index: int, w: Array, sigma: Array, influence: Array, bits: int
) -> Action:
    sources = sorted(range(len(names)), key=lambda i: -abs(w[i, index]))[:NAMED]
    parts = [f"{names[i]} {w[i, index]:.2f}" for i in sources if w[i, index]]
    text = (f"influence on the output {influence[index]:.3f}, own noise {sigma[index]:.3f}, "
            f"suggests {bits} bits")  # fmt: skip
    return Action(names[index], text, f"errors from {', '.join(parts)}" if parts else "", False)
