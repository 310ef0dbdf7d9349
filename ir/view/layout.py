"""Layered drawing of a directed acyclic graph (Sugiyama's method), on networkx.

Layers by longest path, long edges led through placeholders, order within a layer by barycenters,
horizontal places by least squares under the order found (isotonic regression).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

_SWEEPS = 8
_BEND = 10.0  # width that a passing edge takes up


@dataclass(frozen=True)
class Layout:
    """The places of boxes and arrows, in pixels.

    Attributes:
        centers: centre of every node.
        routes: for every edge, the points it passes, from the source's lower edge to the
            target's upper edge.
        width, height: of the whole drawing.
    """

    centers: dict[Hashable, tuple[float, float]]
    routes: dict[tuple[Hashable, Hashable], list[tuple[float, float]]]
    width: float
    height: float


def layered(
    graph: nx.DiGraph,
    sizes: Mapping[Any, tuple[float, float]],
    gap: tuple[float, float] = (22.0, 30.0),
) -> Layout:
    """Places the nodes of an acyclic graph in layers from top to bottom.

    Args:
        graph: acyclic; its node order is kept where nothing speaks against it.
        sizes: (width, height) of every node.
        gap: space between neighbours in a layer, and between layers.
    """
    if not graph:
        return Layout({}, {}, 0.0, 0.0)
    rank = _ranks(graph)
    chains, extended = _with_bends(graph, rank)
    layers: list[list[Hashable]] = [[] for _ in range(max(rank.values()) + 1)]
    for node in extended:
        layers[rank[node]].append(node)
    _order(layers, extended)
    widths = {node: sizes[node][0] if node in sizes else _BEND for node in extended}
    x = _places(layers, extended, widths, gap[0])
    left = min(x[node] - widths[node] / 2 for node in extended)
    heights = [max((sizes[n][1] for n in layer if n in sizes), default=0.0) for layer in layers]
    tops = [sum(heights[:i]) + gap[1] * i for i in range(len(layers))]
    middle = {n: tops[r] + heights[r] / 2 for r, layer in enumerate(layers) for n in layer}
    centers = {node: (x[node] - left, middle[node]) for node in graph}
    routes = {}
    for (source, target), chain in chains.items():
        start = (centers[source][0], centers[source][1] + sizes[source][1] / 2)
        end = (centers[target][0], centers[target][1] - sizes[target][1] / 2)
        bends = [(x[node] - left, middle[node]) for node in chain[1:-1]]
        routes[source, target] = [start, *bends, end]
    width = max(x[node] + widths[node] / 2 for node in extended) - left
    return Layout(centers, routes, width, tops[-1] + heights[-1])


def _ranks(graph: nx.DiGraph) -> dict[Hashable, int]:
    """Layer of every node: longest path from the sources; sources sit just above their users."""
    rank: dict[Hashable, int] = {}
    for index, generation in enumerate(nx.topological_generations(graph)):
        rank |= dict.fromkeys(generation, index)
    for node in graph:
        if graph.in_degree(node) == 0 and graph.out_degree(node):
            rank[node] = min(rank[target] for target in graph.successors(node)) - 1
    lowest = min(rank.values())
    return {node: value - lowest for node, value in rank.items()}


def _with_bends(
    graph: nx.DiGraph, rank: dict[Hashable, int]
) -> tuple[dict[tuple[Hashable, Hashable], list[Hashable]], nx.DiGraph]:
    """Chain of nodes for every edge, one per layer, and the graph made of these chains."""
    extended = nx.DiGraph()
    extended.add_nodes_from(graph)
    chains = {}
    for source, target in graph.edges:
        bends: list[Hashable] = []
        for layer in range(rank[source] + 1, rank[target]):
            bends.append(("bend", source, target, layer))
            rank[bends[-1]] = layer
        chains[source, target] = [source, *bends, target]
        nx.add_path(extended, chains[source, target])
    return chains, extended


def _order(layers: list[list[Hashable]], graph: nx.DiGraph) -> None:
    """Sorts each layer by the mean place of its neighbours, down and up in turn."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = graph.predecessors if down else graph.successors
        order = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for index in order:
            fixed = layers[index - 1 if down else index + 1]
            place = {node: position for position, node in enumerate(fixed)}
            own = {node: position for position, node in enumerate(layers[index])}
            means = {}
            for node in layers[index]:
                near = [place[other] for other in neighbours(node) if other in place]
                means[node] = sum(near) / len(near) if near else float(own[node])
            layers[index].sort(key=lambda node: (means[node], own[node]))


def _places(
    layers: list[list[Hashable]], graph: nx.DiGraph, widths: dict[Hashable, float], gap: float
) -> dict[Hashable, float]:
    x: dict[Hashable, float] = {}
    for layer in layers:
        offset = 0.0
        for node in layer:
            x[node] = offset + widths[node] / 2
            offset += widths[node] + gap
    for sweep in range(2 * _SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = []
            for node in layer:
                near = [*graph.predecessors(node), *graph.successors(node)]
                wanted.append(sum(x[n] for n in near) / len(near) if near else x[node])
            x.update(zip(layer, _spread(layer, wanted, widths, gap), strict=True))
    return x


def _spread(
    layer: list[Hashable], wanted: list[float], widths: dict[Hashable, float], gap: float
) -> list[float]:
    """The places nearest to those wanted, in least squares, that keep order and distance."""
    offsets = [0.0]
    for left, right in pairwise(layer):
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + gap)
    pools: list[tuple[float, int]] = []  # (mean, members): pool adjacent violators
    for target, offset in zip(wanted, offsets, strict=True):
        mean, members = target - offset, 1
        while pools and pools[-1][0] > mean:
            last, count = pools.pop()
            mean = (last * count + mean * members) / (count + members)
            members += count
        pools.append((mean, members))
    flat = [mean for mean, members in pools for _ in range(members)]
    return [base + offset for base, offset in zip(flat, offsets, strict=True)]
