"""Graph networks on dense tensors: torch_geometric's dense layers, point clouds, set networks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from conformance.users.catalog import enter
from conformance.zoo import Field, floats
from torch import Tensor, nn

NODES, FEATURES, CLASSES = 12, 8, 4


def adjacency(*shape: int | str) -> Field:
    """Symmetric zero-one adjacency matrices."""

    def sample(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        edges = (torch.rand(s, generator=g) < 0.3).float()
        return ((edges + edges.transpose(-1, -2)) > 0).float()

    return Field(sample, shape)


GRAPH: dict[str, Field] = {
    "x": floats("batch", NODES, FEATURES),
    "adj": adjacency("batch", NODES, NODES),
}


class DenseStack(nn.Module):
    """Two dense graph layers with a norm, and a mean over the nodes."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in layers)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        """Returns the scores of each graph."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x, adj).transpose(1, 2)).transpose(1, 2).relu()
        scores: Tensor = self.head(x.mean(1))
        return scores


def dense(name: str, *, width: int = 16, **settings: Any) -> None:
    def make() -> nn.Module:
        kind = getattr(importlib.import_module("torch_geometric.nn"), name)
        if name == "DenseGINConv":
            parts = [nn.Sequential(nn.Linear(i, width), nn.ReLU(), nn.Linear(width, width))
                     for i in (FEATURES, width)]  # fmt: skip
            return DenseStack([kind(part) for part in parts], width)
        if settings.get("heads"):
            each = width // settings["heads"]
            return DenseStack([kind(i, each, **settings) for i in (FEATURES, width)], width)
        return DenseStack([kind(i, width, **settings) for i in (FEATURES, width)], width)

    enter(f"torch_geometric.{name}", "graphs", make, GRAPH)


class Pooled(nn.Module):
    """One dense graph layer, clusters by a learned assignment, and a second layer on them."""

    def __init__(self, pool: str, clusters: int = 4, width: int = 16) -> None:
        super().__init__()
        library = importlib.import_module("torch_geometric.nn")
        self.pool = getattr(library, pool)
        self.assign = nn.Linear(width, clusters)
        self.first = library.DenseGraphConv(FEATURES, width)
        self.second = library.DenseGraphConv(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, adj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the scores of each graph and the two losses of the assignment."""
        x = self.first(x, adj).relu()
        x, adj, first, second = self.pool(x, adj, self.assign(x))
        return self.head(self.second(x, adj).relu().mean(1)), first, second


class EdgeConvolution(nn.Module):
    """Dynamic graph network: nearest neighbours of points, a network per edge, a maximum."""

    def __init__(self, neighbours: int = 4, width: int = 16) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.first = nn.Sequential(nn.Conv2d(6, width, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2))
        self.second = nn.Sequential(
            nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)
        )
        self.head = nn.Linear(width, CLASSES)

    def edges(self, x: Tensor) -> Tensor:
        distances = torch.cdist(x, x)
        near = distances.topk(self.neighbours, -1, largest=False).indices
        batch, points, width = x.shape
        index = near.reshape(batch, -1, 1).expand(-1, -1, width)
        other = x.gather(1, index).view(batch, points, self.neighbours, width)
        own = x.unsqueeze(2).expand_as(other)
        return torch.cat([other - own, own], -1).permute(0, 3, 1, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Returns the scores of each cloud, for points (batch, count, 3)."""
        x = self.first(self.edges(points)).amax(-1).transpose(1, 2)
        x = self.second(self.edges(x)).amax(-1)
        scores: Tensor = self.head(x.amax(-1))
        return scores


class Messages(nn.Module):
    """Message passing on a fixed list of edges by `index_add` and `index_select`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        source = torch.arange(NODES)
        self.register_buffer("source", torch.cat([source, source]))
        self.register_buffer("target", torch.cat([(source + 1) % NODES, (source * 5) % NODES]))
        self.message = nn.Sequential(nn.Linear(2 * FEATURES, width), nn.ReLU())
        self.update = nn.GRUCell(width, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores of each node."""
        source, target = x.index_select(1, self.source), x.index_select(1, self.target)
        messages = self.message(torch.cat([source, target], -1))
        gathered = x.new_zeros(x.shape[0], NODES, messages.shape[-1])
        gathered = gathered.index_add(1, self.target, messages)
        state = self.update(gathered.flatten(0, 1), x.flatten(0, 1))
        scores: Tensor = self.head(state.view_as(x))
        return scores


dense("DenseGCNConv")
dense("DenseSAGEConv")
dense("DenseGraphConv")
dense("DenseGATConv", heads=4)
dense("DenseGINConv")
enter("torch_geometric.dense_diff_pool", "graphs", lambda: Pooled("dense_diff_pool"), GRAPH)
enter("torch_geometric.dense_mincut_pool", "graphs", lambda: Pooled("dense_mincut_pool"), GRAPH)
enter("graphs.edge_convolution", "graphs", EdgeConvolution, {"points": floats("batch", 24, 3)})
enter("graphs.message_passing", "graphs", Messages, {"x": floats("batch", NODES, FEATURES)})
