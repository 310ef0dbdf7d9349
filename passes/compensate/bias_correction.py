"""compensate.bias_correction: biases that bring every channel's mean output back."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.calibration.experts import part_names
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.bias import can_set_bias, set_bias
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, PRODUCTS
from graphwright.ir.layers.products import as_matrix, geometry
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result


class BiasCorrectionOptions(Bounded):
    """Options of compensate.bias_correction."""

    targets: Selector = ("*",)
    """Layers whose biases may change: selector patterns over names and kinds."""


class BiasCorrection(Pass[BiasCorrectionOptions]):
    """Adds to every layer's bias what the mean of each of its output channels has lost.

    Compressed weights and activations shift the outputs of a layer by an amount that does not
    average out: E[W x] - E[W' x'], with x and W of the model before the first pass and x' and W'
    of the program now. The difference is measured on the calibration data, layer by layer: each
    sees the inputs that the corrected layers before it give. A layer without a bias gets one; an
    int32 bias keeps its codes' scale.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2, in its empirical form (appendix D); the tuning for networks without
    batch norm in Hubara et al. 2021 (P47).
    """

    contract = "lossy"
    needs = "calibration"
    papers = ("P47",)
    after = ("cleanup.*", "cast.*", "prune.*", "quantize.*")

    def run(self, program: Program, context: Context) -> Result:
        chosen = select(program, self.options.targets, PRODUCTS)
        wanted, refused = _means(program, chosen, context)
        actions = [Action.left(name, why) for name, why in refused.items()]
        kept = [layer for layer in chosen if part_names(layer, 1)[0] in wanted]
        if not kept:
            raise ModelError(
                f"{self.id}: no selected layer has a counterpart in the original model",
                details=tuple(sorted({f"{n}: {why}" for n, why in refused.items()})[:5]),
            )
        found = sweep(program, kept, context.batches, _Shift(wanted), context)
        editor = Editor(program, by=self.id)
        sizes = []
        for layer in kept:
            solved = found[layer.node.name]
            set_bias(editor, layer, solved.state["bias"])
            sizes.append(solved.info["shift"])
            actions.append(Action(layer.name, f"bias moved, mean shift {sizes[-1]:.2e} undone"))
        metrics = {"layers": float(len(kept)), "mean_shift": sum(sizes) / len(sizes)}
        return Result(editor.finish(), tuple(actions), metrics)


def _means(
    program: Program, chosen: list[Layer], context: Context
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Mean output of every channel in the original model, and why layers have none."""
    original = context.before_compression
    known = {} if original is None else {x.name: x for x in layers(original, PRODUCTS)}
    refused: dict[str, str] = {}
    pairs: list[Layer] = []
    for layer in chosen:
        before = known.get(layer.name)
        if layer.kind not in BIAS_ARGUMENT:
            refused[layer.name] = f"a {layer.kind} takes no bias"
        elif original is None or before is None:
            refused[layer.name] = "the original model has no layer of this name"
        elif geometry(original, before).out != geometry(program, layer).out:
            refused[layer.name] = "its channels are no longer the original's"
        elif not can_set_bias(layer):
            refused[layer.name] = "its bias is computed in the graph"
        else:
            pairs.append(before)
    if original is None or not pairs:
        return {}, refused
    within = context.within("original")
    found = sweep(original, pairs, context.batches, _Mean(), within, follow="program")
    means: dict[str, Tensor] = {}
    for layer in pairs:
        each = found[layer.node.name]
        names = part_names(layer, len(each.parts))
        parts = each.parts or (each,)
        means |= {name: part.state["mean"] for name, part in zip(names, parts, strict=True)}
    return means, refused


class _Mean:
    """Means of outputs; by linearity they need the means of the rows only."""

    def gather(self, site: Site) -> Tensor:
        total, count = None, 0
        for rows in site.rows():
            part = rows.double().sum(1)
            total = part if total is None else total + part
            count += rows.shape[1]
        assert total is not None
        return total / max(count, 1)

    def solve(self, task: Task) -> Solved:
        return Solved(state={"mean": self.mean_of(task)})

    def mean_of(self, task: Task) -> Tensor:
        """(out,) float64: mean output of the layer as it is."""
        matrix = as_matrix(task.geometry, task.weight).double()
        mean = torch.einsum("gok,gk->go", matrix, task.stats).flatten()
        return mean if task.bias is None else mean + task.bias.double()


class _Shift(_Mean):
    def __init__(self, wanted: dict[str, Tensor]) -> None:
        self.wanted = wanted

    def solve(self, task: Task) -> Solved:
        shift = self.wanted[task.name] - self.mean_of(task)
        bias = torch.zeros_like(shift) if task.bias is None else task.bias.double()
        moved = (bias + shift).to(task.weight.dtype)
        size = float(shift.norm() / self.wanted[task.name].norm().clamp_min(1e-30))
        return Solved(bias=moved, state={"bias": moved}, info={"shift": size})
