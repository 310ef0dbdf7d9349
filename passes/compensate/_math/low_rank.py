"""Parts shared by the low-rank compensations: originals, and the place of factors in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.experts import is_stack, part_names
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.factors import Factors
from graphwright.ir.layers.kinds import PRODUCTS, TURNED_EXPERTS
from graphwright.ir.layers.products import as_matrix, geometry, weight_key, weight_value
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import Insertion, Make, replace_weight
from graphwright.passes.base import Action

aten = torch.ops.aten
ours = torch.ops.graphwright

COMPRESSING = (
    "quantize.*", "!quantize.smoothquant", "!quantize.bn_tuning",
    "prune.*", "!prune.zig", "!prune.compress", "!prune.udfc", "prune.udfc[weight_bits]",
    "cast.*", "tune.*",
)  # fmt: skip
"""Passes behind which a weight is another one than the original; `!` those that only give it
another form."""


def differences(
    program: Program, original: Program | None, chosen: list[Layer]
) -> tuple[dict[str, Tensor], list[Action]]:
    """Original weights, as matrices, of the layers that were changed; reasons of the others.

    Those of a stack of experts stand under the name of each expert (`part_names`).

    Args:
        program: the compressed program.
        original: the one before compression, with layers of the same names.
        chosen: layers of `program`.

    Raises:
        ModelError: no layer differs from the original.
    """
    known = {} if original is None else {layer.name: layer for layer in layers(original, PRODUCTS)}
    found: dict[str, Tensor] = {}
    actions = []
    for layer in chosen:
        why = _mismatch(program, original, layer, known.get(layer.name))
        if why:
            actions.append(Action.left(layer.name, why))
            continue
        assert original is not None
        before = weight_value(original, known[layer.name])
        if torch.equal(before.float(), weight_value(program, layer).float()):
            actions.append(Action.left(layer.name, "its weight is the original's"))
            continue
        matrices = as_matrix(geometry(program, layer), before)
        found |= dict(zip(part_names(layer, len(matrices)), matrices, strict=True))
    if not found:
        reasons = tuple(sorted({f"{a.layer}: {a.reason}" for a in actions}))
        raise ModelError(
            "no selected layer can be compensated",
            fix="Put the pass behind one that compresses weights; from Python, give the "
            "program before compression as `teacher`.",
            details=reasons[:5],
        )
    return found, actions


def changed(chosen: Iterable[Layer], originals: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that `differences` found, a stack of experts by its first."""
    return [layer for layer in chosen if part_names(layer, 1)[0] in originals]


def _mismatch(
    program: Program, original: Program | None, layer: Layer, before: Layer | None
) -> str:
    if original is None or before is None:
        return "the original model has no layer of this name"
    try:
        now, then = geometry(program, layer), geometry(original, before)
    except ModelError as error:
        return error.message
    if now.is_convolution and now.groups > 1:
        return "a grouped convolution has no low-rank product beside it"
    return "" if now == then else f"its weight was {then.shape} and is {now.shape}"


def insert(program: Program, by: str, chosen: list[Layer], found: Mapping[str, Factors]) -> Program:
    """The program with `weight + b @ a` in the place of the weight of every layer in `found`."""
    editor = Editor(program, by=by)
    for layer in first_uses(chosen):
        if layer.name in found:
            stack = is_stack(layer)
            make = _added_to_stack(found[layer.name]) if stack else _added(found[layer.name])
            replace_weight(editor, layer, make, matrix=not stack)
    return editor.finish()


def first_uses(chosen: Iterable[Layer]) -> list[Layer]:
    """One layer per weight: tied ones change with it."""
    return list({weight_key(layer): layer for layer in reversed(list(chosen))}.values())[::-1]


def _added(factors: Factors) -> Make:
    def make(place: Insertion) -> fx.Node:
        dtype = place.old.meta["val"].dtype
        return place.call(
            ours.add_low_rank.default,
            place.old_matrix(),
            place.store("low_rank_b", factors.b.to(dtype)),
            place.store("low_rank_a", factors.a.to(dtype)),
        )

    return make


def _added_to_stack(factors: Factors) -> Make:
    """The correction of a stack of experts, in the stack's own shape."""

    def make(place: Insertion) -> fx.Node:
        dtype = place.old.meta["val"].dtype
        count, _, columns = (*factors.b.shape[:2], factors.a.shape[2])
        stack = place.call(aten.reshape.default, place.old_matrix(), [count, -1, columns])
        b, a = factors.b.to(dtype), factors.a.to(dtype)
        stored = place.store("low_rank_b", b), place.store("low_rank_a", a)
        value = place.call(ours.add_low_rank.default, stack, *stored)
        turned = place.kind in TURNED_EXPERTS
        return place.call(aten.transpose.int, value, 1, 2) if turned else value

    return make


def action(name: str, rank: int, before: float, after: float) -> Action:
    """The report on a layer."""
    return Action(name, f"rank {rank}, relative error {before:.2e} -> {after:.2e}")


def metrics(before: list[float], after: list[float]) -> dict[str, float]:
    """Means over the compensated layers."""
    count = max(1, len(before))
    return {
        "layers": float(len(before)),
        "layer_error_before": sum(before) / count,
        "layer_error_after": sum(after) / count,
    }
