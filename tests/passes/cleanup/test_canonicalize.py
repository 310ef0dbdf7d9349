from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.edit import Editor

CHAIN = ("text", [("cleanup.canonicalize", {})])

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.conv(x)).view(x.shape[0], -1)


def test_an_inserted_view_is_respelled_and_a_second_run_changes_nothing() -> None:
    program = gw.trace(Net(), (torch.randn(2, 3, 6, 6),), dynamic={"x": {0: "n"}})
    targets = {n.target for n in program.graph.nodes}
    assert aten.view.default not in targets
    assert aten.relu_.default not in targets
    editor = Editor(program, by="test.view")
    out = editor.graph.output_node()
    last = out.args[0][0]
    view = editor.call(aten.view.default, last, [-1, 8], before=out)
    out.args = ((view,),)
    once = gw.passes.cleanup.Canonicalize()(editor.finish())
    assert aten.view.default not in {n.target for n in once.graph.nodes}
    twice = gw.passes.cleanup.Canonicalize()(once)
    assert str(twice.graph) == str(once.graph)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(once(x), program(x).view(-1, 8))
