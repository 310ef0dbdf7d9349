"""A stack of experts as layers of a walk: one linear layer per expert, on the rows routed to it.

So every calibration method sees plain layers, and what it finds for the experts of a stack is put
together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.site import Site, Solved
from graphwright.ir.layers.kinds import EXPERTS, TABLE, TURNED_EXPERTS
from graphwright.ir.layers.products import Geometry
from graphwright.ir.layers.selectors import Layer


def is_stack(layer: Layer) -> bool:
    """Whether a layer is a stack of experts."""
    return layer.kind in EXPERTS


def part_name(layer: Layer, expert: int) -> str:
    """What an expert of a stack is called as a layer."""
    return f"{layer.name}.{expert}"


def part_names(layer: Layer, count: int) -> list[str]:
    """The layers that a walk makes of this one: its experts, or itself."""
    return [part_name(layer, e) for e in range(count)] if is_stack(layer) else [layer.name]


def part_of(layer: Layer, expert: int) -> Layer:
    """An expert of a stack as a layer of its own, of a kind with a matrix."""
    kind = "matmul" if layer.kind in TURNED_EXPERTS else "linear"
    name = part_name(layer, expert)
    return replace(layer, name=name, kind=kind, names=(name,))


def part_geometry(geometry: Geometry) -> Geometry:
    """The geometry of one expert."""
    kind = "matmul" if geometry.kind in TURNED_EXPERTS else "linear"
    return Geometry(kind, geometry.shape[1:])


def routing_node(layer: Layer) -> fx.Node:
    """The indices that give every row its expert."""
    place = TABLE[layer.kind].experts
    assert place is not None
    node = layer.node.args[place]
    assert isinstance(node, fx.Node)
    return node


def own_rows(
    values: Iterator[Tensor],
    routing: Iterator[Tensor],
    real: Sequence[Tensor | None],
    expert: int,
) -> Iterator[Tensor]:
    """The rows of an expert in every batch, without those of padding tokens.

    Args:
        values: (n, in), where every token has as many rows as it has experts, side by side.
        routing: (n,) expert of each row.
        real: (batch, length) booleans, true where a token is no padding; None: nothing tells.
        expert: its index.
    """
    for x, ids, tokens in zip(values, routing, real, strict=True):
        own = ids == expert
        if tokens is not None and len(ids) % tokens.numel() == 0:
            own = own & tokens.flatten().repeat_interleave(len(ids) // tokens.numel())
        yield x[own]


def site_of(site: Site, expert: int, routing: Sequence[Tensor]) -> Site:
    """The layers of one expert, and the rows that are routed to it.

    Args:
        site: of stacks that read one activation by one routing.
        expert: its index.
        routing: indices in every batch; rows of the unchanged program are picked by them too, for
            they must be the same tokens.
    """

    def own(values: Iterator[Tensor]) -> Iterator[Tensor]:
        return own_rows(values, iter(routing), site.real, expert)

    def values(node: fx.Node) -> Iterator[Tensor]:
        return own(site.values(node))

    return replace(
        site,
        layers=tuple(part_of(layer, expert) for layer in site.layers),
        geometry=part_geometry(site.geometry),
        real=[None] * len(routing),
        _values=values,
        _originals=lambda: own(site.original_inputs()),
    )


def joined(parts: Sequence[Solved]) -> Solved:
    """What was found for the experts of a stack: tensors stacked, figures averaged.

    Tensors of the experts that differ in shape are in `parts` only.
    """
    weights = [part.weight for part in parts]
    biases = [part.bias for part in parts]
    state = {}
    for name in parts[0].state:
        tensors = [part.state[name] for part in parts if name in part.state]
        if len(tensors) == len(parts) and len({t.shape for t in tensors}) == 1:
            state[name] = torch.stack(tensors)
    info = {name: sum(part.info[name] for part in parts) / len(parts) for name in parts[0].info}
    return Solved(
        None if any(w is None for w in weights) else torch.stack(weights),  # type: ignore[arg-type]
        None if any(b is None for b in biases) else torch.stack(biases),  # type: ignore[arg-type]
        None,
        state,
        info,
        tuple(parts),
    )
