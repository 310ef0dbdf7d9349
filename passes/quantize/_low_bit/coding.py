"""Parts shared by passes that put codes in the place of weights: the choice of layers,
insertion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import CODABLE, TABLES
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import Make, replace_weight
from graphwright.ir.stored.refusals import refusals
from graphwright.passes.base import Action

Find = Callable[[Layer], tuple[Make, Action]]
"""Gives the maker of the nodes of a layer's weight, and the report on it."""


def choose(
    program: Program, by: str, targets: Sequence[str], *, embeddings: bool
) -> tuple[list[Layer], list[Action]]:
    """The selected layers whose weight can become codes, and what is said of the others.

    Raises:
        ModelError: there is none, or a pattern matches nothing.
    """
    chosen = select(program, targets, CODABLE)
    return kept(by, chosen, refusals(program, chosen, embeddings=embeddings))


def kept(
    by: str, chosen: Sequence[Layer], refused: Mapping[Layer, str]
) -> tuple[list[Layer], list[Action]]:
    """The layers that are not refused, and what is said of those that are.

    Raises:
        ModelError: none is left.
    """
    layers = [layer for layer in chosen if layer not in refused]
    if not layers:
        reasons = sorted({f"{layer.name}: {refused[layer]}" for layer in chosen})
        raise ModelError(f"{by} can quantize none of its targets", details=tuple(reasons))
    left = [x for x in chosen if x in refused]
    return layers, [Action.left(layer.name, refused[layer]) for layer in left]


def uncalibrated(layer: Layer) -> str:
    """What a layer of `STORED` is, for messages."""
    if layer.kind in TABLES:
        return "an embedding table"
    return f"a weight of {layer.kind}"


def insert(editor: Editor, layers: Sequence[Layer], find: Find, shared: str = "") -> list[Action]:
    """Puts codes in the place of every layer's weight, once for layers that share it.

    Args:
        editor: of a copy of the program that the layers were found in.
        layers: to be quantized.
        find: called once per weight.
        shared: what is said of a layer whose weight another has had done; the same as of that one
            when empty.
    """
    actions: list[Action] = []
    done: dict[fx.Node, Action] = {}
    for layer in layers:
        weight = weight_node(layer)
        first = done.get(weight)
        if first is None:
            make, done[weight] = find(layer)
            replace_weight(editor, layer, make)
            actions.append(done[weight])
        else:
            reason = f"shares the weight of {first.layer}"
            actions.append(Action(layer.name, shared or first.what, reason))
    return actions


def output_error(old: Tensor, new: Tensor, h: Tensor) -> float:
    """||x (old - new)^T|| / ||x old^T||, for inputs with second moments h.

    Args:
        old, new: (..., out, k).
        h: (..., k, k).
    """
    change, size = (float(((m @ h) * m).sum().clamp(min=0)) for m in (old - new, old))
    return float((change / size) ** 0.5) if size > 0 else float(change**0.5)


def layer_errors(errors: Sequence[float]) -> dict[str, float]:
    """Metrics of the layers' errors; none without a layer."""
    if not errors:
        return {}
    return {
        "layers": float(len(errors)),
        "layer_error_mean": sum(errors) / len(errors),
        "layer_error_max": max(errors),
    }
