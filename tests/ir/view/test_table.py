"""Graph view, layer table, folding, layout and drawing, on small models and hostile names."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphwright.ir.trace.capture import trace
from graphwright.ir.view.drawing import clean, draw, draw_blocks
from graphwright.ir.view.layout import layered
from graphwright.ir.view.table import Block, layer_table, module_blocks, op_blocks, to_networkx


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def program():
    return trace(Deep(5), [torch.randn(2, 8)], {"x": {0: "batch"}})


def test_networkx_view_has_every_node_and_use(program):
    graph = to_networkx(program)
    assert set(graph) == {node.name for node in program.graph.nodes}
    uses = {(a.name, n.name) for n in program.graph.nodes for a in n.all_input_nodes}
    assert set(graph.edges) == uses
    assert nx.is_directed_acyclic_graph(graph)
    linears = [d for _, d in graph.nodes(data=True) if d["kind"] == "linear"]
    assert [d["scope"] for d in linears[:3]] == ["stem", "blocks.0.up", "blocks.0.down"]
    assert linears[1]["shape"] == ("batch", 16)
    assert linears[1]["dtype"] == "float32"
    assert linears[1]["scope_class"].endswith("Linear")


def test_layer_table(program):
    rows = layer_table(program)
    assert [row.name for row in rows][:3] == ["stem", "blocks.0.up", "blocks.0.down"]
    up = rows[1]
    assert (up.kind, up.inputs, up.output) == ("linear", "(batch, 8)", "(batch, 16)")
    assert (up.parameters, up.weight_bytes, up.macs) == (8 * 16 + 16, 576, 2 * 8 * 16)
    assert up.formula == "128*batch"


def test_equal_blocks_are_folded(program):
    blocks = [data["block"] for _, data in module_blocks(program).nodes(data=True)]
    counts = {block.title: block.count for block in blocks}
    assert counts == {
        "x": 1, "stem": 1, "blocks.0–4.up": 5, "blocks.0–4.act": 5, "blocks.0–4.down": 5,
        "blocks.0–4": 5, "head": 1, "output": 1,
    }  # fmt: skip


def test_coarser_modules_when_there_are_too_many(program):
    blocks = [data["block"] for _, data in module_blocks(program, 3).nodes(data=True)]
    assert "blocks.0–4" in [block.title for block in blocks]
    assert len(blocks) == 3 + 2  # and input and output


def test_siblings_with_other_names_are_not_repetitions():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.left(x) + self.right(x)

    graph = module_blocks(trace(Two(), [torch.randn(2, 4)]))
    assert all(data["block"].count == 1 for _, data in graph.nodes(data=True))


def test_blocks_are_acyclic_when_scopes_interleave():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):  # a, b and a again, with loose operators between
            return self.a(torch.relu(self.b(torch.sin(self.a(x))))) + 1

    graph = module_blocks(trace(Interleaved(), [torch.randn(2, 4)]))
    assert nx.is_directed_acyclic_graph(graph)
    assert [d["block"].title for _, d in graph.nodes(data=True)].count("a") == 2


def test_rebuilt_weights_stand_in_the_module_that_uses_them(program):
    """Operators on stored tensors alone, wherever they stand in the graph."""
    import graphwright.ir.ops  # noqa: F401  (registers the custom ops)
    from graphwright.ir.edit import Editor

    editor = Editor(program, by="test")
    first = next(n for n in editor.graph.nodes if n.op == "call_function")
    for node in [n for n in editor.graph.nodes if n.op == "call_function"]:
        if "linear" in node.name:
            x, weight, bias = node.args
            doubled = editor.call(torch.ops.aten.mul.Tensor, weight, 2.0, before=first)
            editor.set_args(node, x, doubled, bias)
    graph = module_blocks(editor.finish())
    titles = [data["block"].title for _, data in graph.nodes(data=True)]
    assert sorted(titles) == sorted(
        ["x", "stem", "blocks.0–4.up", "blocks.0–4.act", "blocks.0–4.down", "blocks.0–4", "head",
         "output"]
    )  # fmt: skip


def test_op_blocks_leave_weights_and_sizes_out(program):
    titles = [data["block"].title for _, data in op_blocks(program).nodes(data=True)]
    assert titles.count("linear") == 12
    assert not any("weight" in title for title in titles)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 40), st.floats(0.0, 0.4), st.integers(0, 1000))
def test_layout_never_overlaps_and_always_points_down(nodes, density, seed):
    random = nx.gnp_random_graph(nodes, density, seed=seed)
    graph = nx.DiGraph((min(e), max(e)) for e in random.edges)
    graph.add_nodes_from(range(nodes))
    sizes = {n: (30.0 + 7 * (n % 5), 20.0 + 4 * (n % 3)) for n in graph}
    layout = layered(graph, sizes)
    boxes = {
        n: (x - sizes[n][0] / 2, y - sizes[n][1] / 2, x + sizes[n][0] / 2, y + sizes[n][1] / 2)
        for n, (x, y) in layout.centers.items()
    }
    tiny = 1e-6
    for a in graph:
        assert boxes[a][0] >= -tiny
        assert boxes[a][2] <= layout.width + tiny
        assert boxes[a][3] <= layout.height + tiny
        for b in graph:
            if a < b:
                apart = (
                    boxes[a][2] <= boxes[b][0] + tiny or boxes[b][2] <= boxes[a][0] + tiny
                    or boxes[a][3] <= boxes[b][1] + tiny or boxes[b][3] <= boxes[a][1] + tiny
                )  # fmt: skip
                assert apart
    assert set(layout.routes) == set(graph.edges)
    for points in layout.routes.values():
        assert all(above[1] < below[1] for above, below in pairwise(points))


def test_layout_of_nothing():
    assert layered(nx.DiGraph(), {}).centers == {}


@pytest.mark.parametrize("level", ["module", "op"])
def test_drawing_is_xml_without_links(program, level):
    svg = draw(program, level)
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<script" not in svg
    assert "href" not in svg
    assert svg.count("http") == 1  # the namespace
    texts = " ".join(
        element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")
    )
    assert "(batch, 16)" in texts


def test_three_hundred_nodes_stay_small_and_in_columns():
    program = trace(Deep(60), [torch.randn(2, 8)])
    assert len(program.graph.nodes) > 300
    coarse, fine = draw(program), draw(program, "op")
    assert len(coarse) < 20_000
    assert len(fine) < 300_000
    assert float(ET.fromstring(fine).get("width")) < 600  # a chain with skips is no wider


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_names_of_models_cannot_break_the_drawing(name):
    graph = nx.DiGraph()
    graph.add_node(0, block=Block(name, name, "other", 2, name))
    titles = ET.fromstring(draw_blocks(graph)).iter("{http://www.w3.org/2000/svg}title")
    assert len(list(titles)) == 1


def test_clean_escapes_and_replaces():
    assert clean('<a b="c">&\x00\ud800') == "&lt;a b=&quot;c&quot;&gt;&amp;��"
