"""prune.dsnot: pruned and kept weights trade places, without training and without new values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.calibration.experts import part_names
from graphwright.ir.calibration.hessian import hessian, inverse_factor, seen_or_even
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.errors import ArgumentError
from graphwright.ir.layers.products import as_matrix, from_matrix, geometry
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.prune._masks.layers import maskable, share_of_zeros, with_weights
from graphwright.passes.prune._masks.patterns import Pattern, SparsityOptions, found_pattern
from graphwright.passes.prune._math import sparsegpt as sparsegpt_math
from graphwright.passes.prune._math.dsnot import DsnotSettings, Refined, refine
from graphwright.passes.prune._math.features import Features, features

DAMPING = 0.01
"""Of the Hessian behind the SparseGPT mask, as in the paper's code."""

FARTHEST = 0.5
"""Kept weights farther than this from the original's, relatively, are not the same weights."""


class DsnotOptions(SparsityOptions):
    """Options of prune.dsnot."""

    rules = (
        Rule("base", "base != 'existing' or (sparsity is None and pattern == 'unstructured')",
             "the mask is there already: leave out `pattern` and `sparsity`"),
        Rule("update", "not update or base == 'sparsegpt'",
             "only the base sparsegpt updates weights"),
    )  # fmt: skip

    base: Literal["existing", "magnitude", "wanda", "sparsegpt"] = "wanda"
    """The mask to start from: the zeros that the program has (their values come from the program
    before the first pass), or a mask by |w|, |w| ||x|| or SparseGPT's score, with the same share
    in every row. `existing` keeps the pattern that it finds, and takes no `pattern` or
    `sparsity`."""

    update: bool = False
    """With the base `sparsegpt`: also move the weights as SparseGPT does, before the trades. The
    paper takes its mask alone."""

    threshold: Annotated[float, Field(ge=0)] = 0.1
    """A row is left alone once its expected change, summed over an average sample (a sequence, an
    image), is no larger; in units of the layer's output."""

    cycles: Annotated[int, Field(ge=1)] = 50
    """Most trades in a row."""

    power: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the input's variance in the order in which weights come back."""

    same_sign: bool = True
    """End a row rather than let its expected change turn to the other side. The paper's code has
    this test off by default; without it outputs can get worse while their means get better."""

    never_worse: bool = False
    """End a row rather than let its expected change grow: under N:M the weight to drop is chosen
    whatever its sign, and may take away more than comes back. A rule of ours, not of the paper."""


@dataclass(frozen=True)
class Stats:
    """The statistics of a layer's input; the matrices of weights that can come back by layer."""

    features: Features
    hessian: Tensor | None
    dense: dict[str, Tensor]


@dataclass(frozen=True)
class DsnotMethod:
    """A base mask, then trades."""

    base: str
    update: bool
    pattern: Pattern
    settings: DsnotSettings
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    def gather(self, site: Site) -> Stats:
        """Statistics of the input."""
        h = seen_or_even(hessian(site.rows())) if self.base == "sparsegpt" else None
        names = [layer.name for layer in site.layers if layer.name in self.dense]
        return Stats(features(site), h, {name: self.dense[name] for name in names})

    def solve(self, task: Task) -> Solved:
        """The weight under the refined mask."""
        w = as_matrix(task.geometry, task.weight).float()
        dense = task.stats.dense.get(task.name, w)
        parts, results = [], []
        for group in range(len(w)):
            current, keep, metric, pattern = self._start(task, group, w[group])
            seen: Features = task.stats.features
            wanda = current.abs() * seen.norm[group]
            result = refine(
                dense[group], current, keep, seen.total[group], seen.variance[group],
                metric if pattern.m else wanda, pattern, self.settings,
            )  # fmt: skip
            values = torch.where(keep, current, dense[group])
            parts.append(values.where(result.keep, 0.0))
            results.append(result)
        weight = from_matrix(task.geometry, torch.stack(parts)).to(task.weight.dtype)
        return Solved(weight, state={"weight": weight}, info=_info(results))

    def _start(self, task: Task, group: int, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Pattern]:
        """Values, mask, metric and pattern that the trades start from."""
        stats: Stats = task.stats
        size = w.abs() * stats.features.norm[group]
        if self.base == "existing":
            keep = w != 0
            return w, keep, size, found_pattern(keep)
        metric = w.abs() if self.base == "magnitude" else size
        if self.base == "sparsegpt":
            assert stats.hessian is not None
            h = stats.hessian[group]
            upper, _ = inverse_factor(h, DAMPING, task.name)
            metric = sparsegpt_math.score(w, upper, h.diagonal() == 0)
            if self.update:
                keep = self.pattern.keep(metric)
                current, _ = sparsegpt_math.prune_matrix(w, upper, self.pattern, keep=keep)
                return current, keep, metric, self.pattern
        keep = self.pattern.keep(metric)
        return w.where(keep, 0.0), keep, metric, self.pattern


def _info(results: list[Refined]) -> dict[str, float]:
    before = torch.cat([r.before for r in results]).abs()
    after = torch.cat([r.after for r in results]).abs()
    keep = torch.stack([r.keep for r in results])
    return {
        "zeros": float((~keep).float().mean()),
        "trades": float(sum(r.trades for r in results)),
        "before": float(before.mean()),
        "after": float(after.mean()),
    }


class Dsnot(Pass[DsnotOptions]):
    """Lets pruned and kept weights of a row trade places until its mean output is restored.

    A trade brings back the pruned weight whose mean contribution points the way the row's output
    was changed, with the least variance, and drops a kept weight of the other direction with the
    lowest |w| ||x||. Every row keeps its number of zeros, an N:M mask its groups, and every kept
    weight its value. Nothing is trained. Layers are pruned in the order of the graph, each on the
    activations that the pruned layers before it give.

    With `base: existing`, the passes in front must have left the kept weights near their original
    values: layers whose weights were rescaled in between are left alone.

    Source: Zhang et al. 2024, "Dynamic Sparse No Training: training-free fine-tuning for sparse
    LLMs", section 3. The variance is that of all calibration rows, as in its equation 4; its code
    averages the variances within single sequences. The paper's runs refine the projections of
    attention alone: choose them with `targets` to do so.
    """

    contract = "lossy"
    takes = MATRICES
    needs = "calibration"
    papers = ("P10",)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        pattern = o.wanted()
        existing = o.base == "existing"
        layers, actions = maskable(program, o.targets, Pattern(0.0) if existing else pattern)
        dense: dict[str, Tensor] = {}
        if existing:
            layers, dense, reasons = _originals(program, context.before_compression, layers)
            actions += reasons
        settings = DsnotSettings(o.threshold, o.cycles, o.power, o.same_sign, o.never_worse)
        method = DsnotMethod(o.base, o.update, pattern, settings, dense)
        found = sweep(program, layers, context.batches, method, context)
        weights = {layer.weight: found[layer.node.name].state["weight"] for layer in layers}
        actions += [Action(layer.name, _said(found[layer.node.name].info)) for layer in layers]
        refined = with_weights(program, self.id, weights)
        infos: list[dict[str, Any]] = [found[layer.node.name].info for layer in layers]
        metrics = {
            "layers": float(len(weights)),
            "sparsity": share_of_zeros(refined, list(weights)),
            "trades": sum(i["trades"] for i in infos),
            "expected_change_before": sum(i["before"] for i in infos) / len(infos),
            "expected_change_after": sum(i["after"] for i in infos) / len(infos),
        }
        return Result(refined, tuple(actions), metrics)


def _said(info: Mapping[str, float]) -> str:
    return (
        f"{info['zeros']:.1%} zeros, {info['trades']:.0f} trades, "
        f"mean |expected change| {info['before']:.3g} to {info['after']:.3g}"
    )


def _originals(
    program: Program, teacher: Program | None, layers: list[Layer]
) -> tuple[list[Layer], dict[str, Tensor], list[Action]]:
    """Layers with zeros whose values the original program still has; reasons of the others.

    Raises:
        ArgumentError: there is none.
    """
    dense: dict[str, Tensor] = {}
    good, actions = [], []
    for layer in layers:
        w = program.state[layer.weight].detach()
        old = None if teacher is None else teacher.state.get(layer.weight)
        reason = _no_original(w, old)
        if reason:
            actions.append(Action.left(layer.name, reason))
            continue
        assert old is not None
        matrices = as_matrix(geometry(program, layer), old.detach().to(w.device)).float()
        names = part_names(layer, len(matrices))
        whole = [matrices] if len(names) == 1 else list(matrices.unsqueeze(1))
        dense |= dict(zip(names, whole, strict=True))
        good.append(layer)
    if not good:
        first = actions[0]
        raise ArgumentError(
            f"no layer has zeros to bring back: {first.layer}: {first.reason}",
            fix="Prune first and pass teacher=the dense program, or choose another `base`.",
        )
    return good, dense, actions


def _no_original(w: Tensor, old: Tensor | None) -> str:
    if not bool((w == 0).any()):
        return "it has no zeros"
    if old is None or old.shape != w.shape:
        return "the original program has no such weight"
    old = old.detach().to(w.device)
    if not bool(((w == 0) & (old != 0)).any()):
        return "the original program has the same zeros"
    keep = w != 0
    far = (w - old)[keep].float().norm() > FARTHEST * old[keep].float().norm()
    return "its kept weights are not the original's" if bool(far) else ""
