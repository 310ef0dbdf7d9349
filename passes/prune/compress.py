"""prune.compress: 2:4 weights are stored as the two values that are left, and their places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import PRODUCTS, is_stored_as_matrices
from graphwright.ir.layers.products import Geometry, as_matrix, geometry
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import rebuild_two_of_four, replace_weight
from graphwright.passes.base import Action, Context, Options, Pass, Result

aten = torch.ops.aten


class CompressOptions(Options):
    """Options of prune.compress."""

    targets: Selector = ("*",)
    """Layers to store compressed where they can be: selector patterns over names and kinds."""


class Compress(Pass[CompressOptions]):
    """Stores a weight with at most two non-zeros in every four as those two and their places.

    The weight is rebuilt in the graph. It takes 53% of its bytes in float32, 56% in a half
    precision, in the program and in every file made from it. ONNX Runtime rebuilds it once, when
    it loads the model, and runs dense. The Triton backend multiplies it as it is, on PyTorch's
    semi-structured sparse kernels (GPUs from capability 8.0, half precisions, sizes that are
    multiples of 32 and 64), and keeps a copy in their layout; elsewhere it rebuilds it in every
    call. Weights with zeros in other places are stored dense and stay as they are: an
    unstructured zero takes as many bytes as any other value.
    """

    contract = "exact"
    after = ("cleanup.*", "cast.*", "prune.*")

    def run(self, program: Program, context: Context) -> Result:
        layers = select(program, self.options.targets, PRODUCTS)
        editor = Editor(program, by=self.id)
        actions, before, after = [], 0, 0
        done: set[str] = set()
        for layer in layers:
            reason = _reason(program, layer)
            if not reason and layer.weight not in done:
                done.add(layer.weight)
                old = program.state[layer.weight]
                size = _store(editor, layer, geometry(program, layer))
                before, after = before + old.numel() * old.element_size(), after + size
            done_to = (
                Action.left(layer.name, reason) if reason else Action(layer.name, "two of four")
            )
            actions.append(done_to)
        metrics = {"layers": float(len(done)), "bytes_before": float(before),
                   "bytes_after": float(after)}  # fmt: skip
        return Result(editor.finish(), tuple(actions), metrics)


def _reason(program: Program, layer: Layer) -> str:
    if not layer.weight:
        return "its weight is rebuilt in the graph already"
    weight = program.state[layer.weight]
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight is {weight.dtype}" if weight.numel() else "its weight is empty"
    if not is_stored_as_matrices(layer.kind, weight):
        return f"its weight has {weight.dim()} dimensions"
    w = _rows(geometry(program, layer), weight)
    if w.shape[1] % 4:
        return f"its {w.shape[1]} inputs do not divide into groups of 4"
    filled = (w.reshape(-1, 4) != 0).sum(1)
    full = int((filled > 2).sum())
    return f"{full} of its {len(filled)} groups of four hold more than two" if full else ""


def _rows(shape: Geometry, weight: Tensor) -> Tensor:
    """(outputs, inputs)."""
    return as_matrix(shape, weight.detach()).flatten(0, 1)


def _store(editor: Editor, layer: Layer, shape: Geometry) -> int:
    """Puts values and places in a stored weight's stead, for all its readers; their bytes."""
    from graphwright.ir.ops.expand_2_4 import compress_2_4

    old = editor.state[layer.weight]
    values, places = compress_2_4(_rows(shape, old))
    kept: Tensor = values
    if isinstance(old, nn.Parameter):
        kept = nn.Parameter(values, requires_grad=old.requires_grad)
    replace_weight(editor, layer, rebuild_two_of_four(kept, places))
    return values.numel() * values.element_size() + places.numel()
