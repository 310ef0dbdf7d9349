"""Which groups feed which, and the drawing of them."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

import networkx as nx
import torch
from rich.console import Console
from torch import Tensor, nn

import graphwright as gw
from graphwright.commands.inspect import inspect
from graphwright.ir.view.groups import group_blocks


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.b(torch.relu(self.a(x))))


def traced() -> gw.Program:
    return gw.trace(Residual().eval(), (torch.randn(2, 3),), dynamic="batch")


def test_arrows_follow_the_layers_and_lead_nowhere_back() -> None:
    graph = group_blocks(gw.channel_groups(traced()))
    assert nx.is_directed_acyclic_graph(graph)
    titles = {node: block.title for node, block in graph.nodes(data="block")}
    arrows = {(titles[a], titles[b]) for a, b in graph.edges}
    assert ("stem.weight:0", "a.weight:0") in arrows
    assert ("stem.weight:0", "head.weight:0") in arrows  # the head's rows stay, and say why
    assert any("an output of the program" in b.detail for _, b in graph.nodes(data="block"))


def test_inspect_lists_slices_and_draws_the_groups(tmp_path: Path) -> None:
    path, picture = tmp_path / "model.pt2", tmp_path / "groups.svg"
    traced().save(path)
    console = Console(width=240, record=True, file=io.StringIO())
    arguments = Namespace(model=str(path), spec=None, groups=True, svg=str(picture),
                          level="module", allow_pickle=False)  # fmt: skip
    assert inspect(arguments, console) == 0
    shown = console.export_text()
    assert "a.weight:0, a.bias:0, b.weight:1" in shown
    assert "an output of the program" in shown
    assert "2 of" in shown
    texts = " ".join(ElementTree.parse(picture).getroot().itertext())
    assert "stem.weight:0" in texts
    assert "6 units in 6 tensors" in texts
